#!/usr/bin/env bash
# What `profile` and `watch` measure on a GPU, as JSON into a folder: measure_profile.sh OUT [short]
# Needs torch, nvcc, ncu and the package importable as dsv4_bench; run in its top folder.
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bench=(python3 -m dsv4_bench.workbench)
brief=(--context 511 --json --seconds 0.05)

step() {  # step SECONDS NAME COMMAND...: its stdout becomes OUT/NAME.json
    local seconds=$1 name=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.json" 2>"$out/$name.err"
    echo "$name: exit $?, $((SECONDS - started)) s"
    tail -n 4 "$out/$name.err"
}

# Single layers first: `short` is done in about half a minute.
timeout 60 python3 tests/flash_layers.py "$work/csa" CSA &
timeout 60 python3 tests/flash_layers.py "$work/hca" HCA
step 40 hca "${bench[@]}" profile "$work/hca" --layer 0 --graph "${brief[@]}"
wait
step 40 csa "${bench[@]}" profile "$work/csa" --layer 0 --graph "${brief[@]}"
(cd "$work" && step 60 ncu_hca "${bench[@]}" profile "$work/hca" --sites 'L0/ffn/*' --context 511 --ncu --json)
step 30 demo "${bench[@]}" profile --layer 3 --graph --json --seconds 0.05 \
    --trace "$out/demo_trace.json" --plot "$out/demo.png"
if [[ ${2:-} != short ]]; then
    timeout 100 python3 tests/flash_layers.py "$work/flash"
    step 60 flash "${bench[@]}" profile "$work/flash" --layers 0-2 "${brief[@]}"
    (cd "$work" && step 60 ncu_csa "${bench[@]}" profile "$work/csa" --layer 0 --context 511 --ncu --json)
    step 40 batch "${bench[@]}" profile "$work/csa" --layer 0 --batch 32 "${brief[@]}"
    (cd "$work" && step 60 ncu_batch "${bench[@]}" profile "$work/csa" --layer 0 --context 511 --batch 32 \
        --ncu --json)
    step 60 prefill "${bench[@]}" profile "$work/csa" --layer 0 --phase prefill "${brief[@]}"
    step 30 reload_rows python3 tests/reload_times.py L3/attn/window_write csrc/cuda/rows_sm90.cu
    step 30 reload_norm python3 tests/reload_times.py L3/attn/q_norm csrc/cuda/norm_sm90.cu
fi
python3 tests/profile_summary.py "$out" >"$out/summary.json"
