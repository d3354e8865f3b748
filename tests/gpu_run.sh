#!/usr/bin/env bash
# What a GPU machine runs: builds every kernel, then tests, sanitizer and benchmarks, each with a time limit.
#   tests/gpu_run.sh OUT [build] [test] [sanitize] [bench [GLOB ...]]
# Needs torch, pytest and nvcc; the repository must be importable as dsv4_bench.
set -uo pipefail
out=$1
shift
mkdir -p "$out"
cd "$(dirname "$0")/.."
pytest=(python3 -m pytest -p no:cacheprovider -c /dev/null --rootdir=. -q -W ignore)

if [[ " $* " == *" build "* ]]; then
    time timeout 200 python3 - <<'PY'
import dsv4_bench.engine.cuda
from dsv4_bench.engine import cuda
print(len(cuda.library.build_all()), "sources built")
PY
fi
if [[ " $* " == *" test "* ]]; then
    # The float64 oracles run on the CPU: side by side with one thread each, if pytest-xdist is there.
    beside=()
    python3 -c "import xdist" 2>/dev/null && beside=(-n 12)
    OMP_NUM_THREADS=1 timeout 400 "${pytest[@]}" "${beside[@]}" tests/test_cuda*.py tests/test_generation_watch.py \
        --junitxml="$out/junit.xml" >"$out/test.log" 2>&1
    grep -E "^E  |^FAILED|passed|failed" "$out/test.log" | tail -40
    python3 tests/gpu_record.py "$out/junit.xml" --tests "$out/gpu_tests.json" --verified "$out/verified.json" \
        --commit "${DSV4_COMMIT:-$(git rev-parse --short HEAD)}"
fi
if [[ " $* " == *" sanitize "* ]]; then
    for tool in memcheck racecheck initcheck synccheck; do
        for part in cuda cuda_attention cuda_dsl cuda_probes; do
            PYTHONPATH=tests:$PYTHONPATH timeout 100 compute-sanitizer --tool $tool \
                --kernel-regex kns=dsv4 --error-exitcode 9 \
                python3 tests/sanitize_$part.py >"$out/$tool.$part.log" 2>&1
            echo "$tool $part: exit $?, $(grep -E '(ERROR|RACECHECK) SUMMARY' "$out/$tool.$part.log" | tail -1)"
        done
    done
fi
if [[ " $* " == *" bench"* ]]; then
    while [[ $1 != bench ]]; do shift; done
    shift
    PYTHONPATH=tests:$PYTHONPATH timeout 240 python3 tests/bench_cuda.py "$@" --json "$out/bench.json"
fi
