// Prints where the expert kernels put every column and decode every code, for test_experts_layout.py.

#include <cstdio>

#include "../csrc/cuda/experts_many.cuh"

using namespace dsv4;

int main() {
    for (int column = 0; column < kManyColumns; column++)
        std::printf("place %d %d\n", column, place_of(column));
    // One code that is 1.0 among zeros: which register of the four, and which half, it comes out in.
    for (int code = 0; code < 8; code++) {
        uint32_t pair[4], half_pair[4];
        e2m1_pairs(2u << 4 * code, pair);
        e2m1_half_pairs(2u << 4 * code, half_pair);
        for (int j = 0; j < 4; j++)
            for (int half = 0; half < 2; half++) {
                if (pair[j] >> 16 * half & 0xFFFF) std::printf("code %d %d %d\n", code, j, half);
                if (half_pair[j] >> 16 * half & 0xFFFF) std::printf("fp16 %d %d %d\n", code, j, half);
            }
    }
    // Every code in fp16, as bits.
    for (uint32_t code = 0; code < 16; code++) {
        uint32_t pair[4];
        e2m1_half_pairs(code, pair);
        std::printf("bits %d %d\n", (int)code, (int)pair[0]);
    }
    return 0;
}
