#!/usr/bin/env bash
# What `profile` and `watch` measure on a GPU, as JSON into a folder: measure_profile.sh OUT [short]
# Needs torch, nvcc, ncu and the package importable as dsv4_bench; run in its top folder. Three minutes, `short` one.
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bench=(python3 -m dsv4_bench.workbench)

step() {  # step SECONDS NAME COMMAND...: its stdout becomes OUT/NAME.json
    local seconds=$1 name=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.json" 2>"$out/$name.err"
    echo "$name: exit $?, $((SECONDS - started)) s"
    tail -n 4 "$out/$name.err"
}

layer() {  # layer NAME KIND ARGUMENT...: one layer's profile
    local name=$1 kind=$2
    shift 2
    step 40 "$name" "${bench[@]}" profile "$work/$kind" --layer 0 --seconds 0.05 --json "$@"
}

counted() {  # the same ops under ncu, as OUT/ncu_NAME.json
    local name=$1 kind=$2
    shift 2
    (cd "$work" && step 50 "ncu_$name" "${bench[@]}" profile "$work/$kind" --layer 0 --ncu --json "$@")
}

timeout 60 python3 tests/flash_layers.py "$work/csa" CSA &
timeout 60 python3 tests/flash_layers.py "$work/hca" HCA
wait
for kind in csa hca; do
    layer $kind $kind --context 511 --graph
    [[ -s $out/$kind.json ]] || layer $kind $kind --context 511  # a graph that was not captured
done
counted csa csa --context 511
layer prefill csa --phase prefill --context 1024
counted prefill csa --phase prefill --context 1024
if [[ ${2:-} == short ]]; then
    python3 tests/profile_summary.py "$out" >"$out/summary.json"
    exit
fi
layer batch csa --batch 64 --context 511
counted batch csa --batch 64 --context 511
step 40 reload_norm python3 tests/reload_times.py L3/attn/q_norm csrc/cuda/norm_sm90.cu
step 40 reload_rows python3 tests/reload_times.py L3/attn/window_write csrc/cuda/rows_sm90.cu
if python3 -c "import cutlass" 2>/dev/null; then
    step 40 reload_dsl python3 tests/reload_times.py L3/attn/wq_b engine/dsl/linear_sm90.py
fi
step 30 demo "${bench[@]}" profile --layer 3 --graph --json --seconds 0.05 --plot "$out/demo.png"
python3 tests/profile_summary.py "$out" >"$out/summary.json"
step 60 builds python3 tests/build_times.py
