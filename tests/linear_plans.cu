// Prints how linear divides few rows over blocks (csrc/cuda/few_rows.cuh), for test_linear_plans.py.
//
// Input: lines of format, n, k, groups, rows. Output, a line each: split, places, rounds, stages of a
// row, stages of a warp, blocks, bytes of shared memory.
#include <cstdio>
#include <cstring>

#include "../csrc/cuda/elements.cuh"
#include "../csrc/cuda/few_rows.cuh"

using namespace dsv4;

template <class Policy> static void print(int64_t n, int64_t k, int64_t groups, int rows) {
    const int64_t group = groups > 1 ? n / groups / 16 : 0;
    const auto plan = FewPlan<Policy>::best(ceil_div(n, 16), group, k, rows);
    std::printf("%d %d %d %d %d %lld %zu\n", plan.split, plan.places(), plan.rounds, plan.all, plan.own,
                (long long)plan.blocks, plan.bytes());
}

int main() {
    char format[8];
    long long n, k, groups;
    int rows;
    while (std::scanf("%7s %lld %lld %lld %d", format, &n, &k, &groups, &rows) == 5) {
        if (!std::strcmp(format, "nvfp4")) print<Nvfp4>(n, k, groups, rows);
        else if (!std::strcmp(format, "fp8")) print<Fp8<float>>(n, k, groups, rows);
        else print<Bf16>(n, k, groups, rows);
    }
    return 0;
}
