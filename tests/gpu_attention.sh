#!/bin/bash
# Builds, checks and times the kernels of attention, hyper-connections, indexer and compressor on a
# machine with an H200, run from the repository root:  tests/gpu_attention.sh OUT [check|sanitize|bench]...
out=$1
shift
python3 -c 'from dsv4_bench.engine.cuda_library import build_all
build_all(["attention", "hyper", "indexer", "topk", "compressor"])' || exit 1
test_files="tests/test_cuda_hyper.py tests/test_cuda_attention.py tests/test_cuda_indexer.py"
options="-p no:cacheprovider -c /dev/null --rootdir=. -W ignore -q"
for stage in "$@"; do
    case $stage in
    check)
        for file in $test_files; do
            log=$out/$(basename "$file" .py).log
            timeout 150 python3 -m pytest $options -s "$file" >"$log" 2>&1
            echo "$file: exit $?"
            grep -E "^(FAILED|ERROR|E  )|passed|failed" "$log" | cut -c1-160 | sort | uniq -c | sort -rn | head -${LINES_SHOWN:-25}
        done
        ;;
    sanitize)  # all tools at once: most of their time is start-up
        tools="memcheck racecheck initcheck synccheck"
        for tool in $tools; do
            timeout 150 compute-sanitizer --tool $tool python3 tests/sanitize_cuda_attention.py \
                >"$out/$tool.log" 2>&1 &
        done
        wait
        for tool in $tools; do
            echo "$tool: $(grep -E 'SUMMARY|^ran' "$out/$tool.log" | tr '\n' ' ')"
        done
        ;;
    bench) timeout 200 python3 tests/bench_cuda_attention.py "$out/bench_cuda_attention.json" $CASES ;;
    esac
done
