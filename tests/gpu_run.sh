#!/usr/bin/env bash
# What a GPU machine runs: builds every kernel, then tests, sanitizer and benchmarks, each with a time limit.
#   tests/gpu_run.sh OUT [build] [test] [sanitize] [mutate] [layer] [count] [bench [GLOB ...]]
# Needs torch, pytest and nvcc, compute-sanitizer for its step; the repository must be importable as dsv4_bench.
# On 16 cores and an H200 about 30, 60, 85, at most 200 (not all mutants get their turn), 150, 60 and 170 s. Every result is in OUT as soon as it is there, and a
# line for every step in OUT/steps.txt; status 1 if one failed. With DSV4_PEERS (docs/peers.md) benchmarks time the peers found there too.
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # many processes side by side, with oracles on the CPU
export PYTHONPATH=tests:${PYTHONPATH:-}
commit=${DSV4_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
steps=() failed=0
while (($#)) && [[ $1 != bench ]]; do steps+=("$1") && shift; done

wants() { [[ " ${steps[*]} " == *" $1 "* ]]; }

step() { # NAME SECONDS COMMAND ...: its output to NAME.log, the last line of it into the summary
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout -k 10 -s INT "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    ((status == 0)) || failed=1
    echo "$name: exit $status in $((SECONDS - began)) s: $(tail -1 "$out/$name.log")" | tee -a "$out/steps.txt"
}

if wants build; then
    step build 200 python3 -c "
import dsv4_bench.engine.implementations
from dsv4_bench.engine import cuda
print(len(cuda.library.build_all()), 'sources built')"
fi
if wants test; then
    beside=()
    python3 -c "import xdist" 2>/dev/null && beside=(-n "$(($(nproc --all) - 2))" --dist worksteal -p fresh_context)
    python3 -c "import pytest_timeout" 2>/dev/null && beside+=(--timeout 120 --timeout-method thread)
    pytest=(python3 -m pytest -p no:cacheprovider -c /dev/null --rootdir=. -q -W ignore)
    suite=(tests/test_generation_watch.py)
    for file in tests/test_cuda*.py; do [[ $file == *_profile.py ]] || suite+=("$file"); done
    step test 240 "${pytest[@]}" "${beside[@]}" "${suite[@]}" --junitxml="$out/junit.xml"
    # Times, which mean nothing beside other processes.
    step test_times 60 "${pytest[@]}" tests/test_cuda_profile.py --junitxml="$out/junit_times.xml"
    grep -E "^E  |^FAILED" "$out/test.log" "$out/test_times.log" | tail -40
    cp engine/verified.json "$out/" 2>/dev/null # entries of what was not tested stay
    step record 60 python3 tests/gpu_record.py "$out"/junit*.xml --tests "$out/gpu_tests.json" \
        --verified "$out/verified.json" --commit "$commit"
fi
if wants sanitize; then
    seconds=${DSV4_SANITIZE_SECONDS:-110}
    step sanitize $((seconds + 20)) python3 tests/sanitize.py "$out/sanitize" --within "$seconds" --commit "$commit"
fi
if wants mutate; then
    step mutate 200 python3 tests/mutate_cuda.py "$out/mutants" --jobs 5
fi
if wants layer; then
    layers=(python3 tests/bench_cuda_layer.py)
    one=(--batch 1 --context 4096)
    step layer 60 "${layers[@]}" --kinds CSA --sites --json "$out/layer.json"
    step layer_kinds 40 "${layers[@]}" --kinds HCA,SWA "${one[@]}" --sites --json "$out/layer_kinds.json"
    step layer_peers 40 "${layers[@]}" --kinds CSA "${one[@]}" --peers --json "$out/layer_peers.json"
    step model 40 "${layers[@]}" --model --json "$out/model.json"
    step probes 60 python3 tests/bench_probes.py --json "$out/probes.json"
    step profile 120 bash tests/measure_profile.sh "$out/profile" short
fi
if wants count; then
    step count 120 python3 tests/count_cuda.py aims --json "$out/counters.json"
fi
if (($#)); then
    shift
    engines=()
    [[ -n ${DSV4_PEERS:-} ]] && engines=('--engines=[!H]*')
    for table in linear experts attention kv dsl; do # a broken table must not cost the others
        step "bench_$table" 120 python3 tests/bench_cuda.py "${engines[@]}" --table "bench_cuda_$table" "$@" \
            --json "$out/cuda_$table.json"
    done
    # Humming compiles a kernel for every shape: its rows have a step of their own.
    python3 -c "import humming" 2>/dev/null && step bench_humming 90 python3 tests/bench_cuda.py '--engines=H*' \
        'linear nvfp4 * m1' 'experts nvfp4 * tokens, *' --table bench_cuda_linear --table bench_cuda_experts \
        --json "$out/cuda_humming.json"
fi
exit $failed
