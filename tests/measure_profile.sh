#!/usr/bin/env bash
# What `profile` and `watch` measure on a GPU, as JSON into a folder: measure_profile.sh OUT [FLASH_FOLDER [short]]
# Needs torch, nvcc, ncu and the package importable as dsv4_bench; run in its top folder.
set -uo pipefail
out=$1
flash=${2:-$out/flash}
mkdir -p "$out"
out=$(realpath "$out")
bench=(python3 -m dsv4_bench.workbench)

step() {  # step SECONDS NAME COMMAND...: its stdout becomes OUT/NAME.json
    local seconds=$1 name=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.json" 2>"$out/$name.err"
    echo "$name: exit $?, $((SECONDS - started)) s"
    tail -n 4 "$out/$name.err"
}

[[ -d $flash ]] || timeout 100 python3 tests/flash_layers.py "$flash"

brief=(--json --seconds 0.05)
step 30 flash "${bench[@]}" profile "$flash" --layer 1 --context 511 --graph "${brief[@]}"
(cd "$out" && step 30 ncu_flash "${bench[@]}" profile "$flash" --sites 'L1/ffn/*' --context 511 --ncu --json)
step 30 demo "${bench[@]}" profile --layer 3 --graph "${brief[@]}" \
    --trace "$out/demo_trace.json" --plot "$out/demo.png"
[[ ${3:-} == short ]] && exit
step 40 all_flash "${bench[@]}" profile "$flash" --layers 0-2 --context 511 "${brief[@]}"
(cd "$out" && step 60 ncu_all_flash "${bench[@]}" profile "$flash" --layers 0-2 --context 511 --ncu --json)
step 40 batch "${bench[@]}" profile "$flash" --layer 1 --context 511 --batch 32 "${brief[@]}"
(cd "$out" && step 60 ncu_batch "${bench[@]}" profile "$flash" --layer 1 --context 511 --batch 32 --ncu --json)
step 40 prefill "${bench[@]}" profile "$flash" --layer 1 --context 1024 --phase prefill "${brief[@]}"
step 30 reload_rows python3 tests/reload_times.py L3/attn/window_write csrc/cuda/rows_sm90.cu
step 30 reload_norm python3 tests/reload_times.py L3/attn/q_norm csrc/cuda/norm_sm90.cu
python3 tests/profile_summary.py "$out" >"$out/summary.json"
