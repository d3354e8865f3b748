// Prints how linear and linears divide few rows over blocks (csrc/cuda/few_rows.cuh), for test_linear_plans.py.
//
// Input: lines of format, n, k, groups, rows; output, a line each: split, places, rounds, stages of a
// row, stages of a warp, blocks, bytes of shared memory. Or of "joint", k, rows, matrices, and format and n
// of each; output: split, bytes of shared memory, and rows of a block and blocks of each.
#include <cstdio>
#include <cstring>

#include "../csrc/cuda/elements.cuh"
#include "../csrc/cuda/linears_sm90.cu"

template <class Shape> static void print_by(int64_t n, int64_t k, int64_t groups, int rows) {
    const int64_t group = groups > 1 ? n / groups / 16 : 0;
    const auto plan = FewPlan<Shape>::best(ceil_div(n, 16), group, k, rows);
    std::printf("%d %d %d %d %d %lld %zu\n", plan.split, plan.places(), plan.rounds, plan.all, plan.own,
                (long long)plan.blocks, plan.bytes());
}

template <class Policy> static void print(int64_t n, int64_t k, int64_t groups, int rows) {
    if (rows == 1) print_by<OneRow<Policy>>(n, k, groups, rows);
    else print_by<SomeRows<Policy>>(n, k, groups, rows);
}

template <int kRows> static void print_joint(const Products& p) {
    const auto division = Division<kRows>::best(p);
    std::printf("%d %zu", division.split, division.shared);
    for (int i = 0; i < p.count; i++)
        std::printf(" %d %d", division.rows[i], division.end[i] - (i > 0 ? division.end[i - 1] : 0));
    std::printf("\n");
}

static void print_joint() {
    char format[8];
    long long n, k, rows;
    Products p = {};
    if (std::scanf("%lld %lld %d", &k, &rows, &p.count) != 3) return;
    p.k = k, p.m = rows;
    for (int i = 0; i < p.count; i++) {
        if (std::scanf("%7s %lld", format, &n) != 2) return;
        p.w[i].format = std::strcmp(format, "bf16") ? DSV4_FP8_F32 : DSV4_DENSE_BF16;
        p.w[i].n = n;
    }
    if (rows == 1) print_joint<1>(p);
    else print_joint<kMostColumns>(p);
}

int main() {
    char format[8];
    long long n, k, groups;
    int rows;
    while (std::scanf("%7s", format) == 1) {
        if (!std::strcmp(format, "joint")) {
            print_joint();
            continue;
        }
        if (std::scanf("%lld %lld %lld %d", &n, &k, &groups, &rows) != 4) return 1;
        if (!std::strcmp(format, "nvfp4")) print<Nvfp4>(n, k, groups, rows);
        else if (!std::strcmp(format, "fp8")) print<Fp8<float>>(n, k, groups, rows);
        else print<Bf16>(n, k, groups, rows);
    }
    return 0;
}
