#!/usr/bin/env bash
# What a GPU machine runs: builds every kernel, then tests, sanitizer and benchmarks, each with a time limit.
#   tests/gpu_run.sh OUT [build] [test] [sanitize] [layer] [bench [GLOB ...]]
# Needs torch, pytest and nvcc; the repository must be importable as dsv4_bench. On 16 cores and an H200 about
# 25, 60, 150, 150 and 150 s. With DSV4_PEERS (docs/peers.md) the benchmarks time the peers found there too.
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # many processes side by side, with oracles on the CPU
pytest=(python3 -m pytest -p no:cacheprovider -c /dev/null --rootdir=. -q -W ignore)

wants() { [[ " ${steps[*]} " == *" $1 "* ]]; }

steps=()
while (($#)) && [[ $1 != bench ]]; do steps+=("$1") && shift; done

if wants build; then
    time timeout 200 python3 - <<'PY'
import dsv4_bench.engine.implementations
from dsv4_bench.engine import cuda
print(len(cuda.library.build_all()), "sources built")
PY
fi
if wants test; then
    beside=()
    python3 -c "import xdist" 2>/dev/null && beside=(-n 12 --dist loadfile)
    timeout 400 "${pytest[@]}" "${beside[@]}" tests/test_cuda*.py tests/test_generation_watch.py \
        --junitxml="$out/junit.xml" >"$out/test.log" 2>&1
    grep -E "^E  |^FAILED|passed|failed" "$out/test.log" | tail -40
    python3 tests/gpu_record.py "$out/junit.xml" --tests "$out/gpu_tests.json" --verified "$out/verified.json" \
        --commit "${DSV4_COMMIT:-$(git rev-parse --short HEAD)}"
fi
sanitize() { # TOOL PART
    PYTHONPATH=tests:${PYTHONPATH:-} timeout 150 compute-sanitizer --tool "$1" --kernel-regex kns=dsv4 \
        --error-exitcode 9 python3 "tests/sanitize_$2.py" >"$out/$1.$2.log" 2>&1
    echo "$1 $2: exit $?, $(grep -E '(ERROR|RACECHECK) SUMMARY' "$out/$1.$2.log" | tail -1)"
}
if wants sanitize; then
    for part in cuda cuda_attention cuda_dsl cuda_probes; do
        for tool in memcheck racecheck initcheck synccheck; do sanitize $tool $part & done
        wait
    done
fi
export PYTHONPATH=tests:${PYTHONPATH:-}
if wants layer; then
    timeout 60 python3 tests/bench_cuda_layer.py --sites --peers --json "$out/layer.json"
    timeout 60 python3 tests/bench_probes.py --json "$out/probes.json"
    timeout 120 bash tests/measure_profile.sh "$out/profile" short
fi
if (($#)); then
    shift
    engines=()
    [[ -n ${DSV4_PEERS:-} ]] && engines=(--engines)
    for table in linear experts attention kv dsl; do # a broken table must not cost the others
        timeout 120 python3 tests/bench_cuda.py "${engines[@]}" --table "bench_cuda_$table" "$@" \
            --json "$out/cuda_$table.json"
    done
fi
