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
from dsv4_bench.engine import cuda_library
print(len(cuda_library.build_all()), "sources built")
PY
fi
if [[ " $* " == *" test "* ]]; then
    timeout 240 "${pytest[@]}" tests/test_cuda_linear.py tests/test_cuda.py tests/test_cuda_build.py \
        --junitxml="$out/junit.xml" >"$out/test.log" 2>&1
    tail -60 "$out/test.log"
    PYTHONPATH=tests:$PYTHONPATH python3 tests/gpu_record.py "$out/junit.xml" "$out/gpu_tests.json"
fi
if [[ " $* " == *" sanitize "* ]]; then
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 100 compute-sanitizer --tool $tool --kernel-regex kns=dsv4 --error-exitcode 9 \
            python3 tests/sanitize_cuda.py >"$out/$tool.log" 2>&1
        echo "$tool: exit $?, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)"
    done
fi
if [[ " $* " == *" bench"* ]]; then
    globs=${*##*bench}
    # shellcheck disable=SC2086
    (set -f; PYTHONPATH=tests:$PYTHONPATH timeout 240 python3 tests/bench_cuda.py $globs --json "$out/bench.json")
fi
