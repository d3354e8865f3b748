// Prints what the bit tricks of the CUDA kernels give, run on the host; test_cuda_build.py judges it.

#include <cstdio>
#include <cstring>

#include "../csrc/cuda/halves.cuh"

using namespace dsv4;

static float bf16_value(uint32_t bits) {
    uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

static void print_halves(const char* name, uint32_t word, const uint32_t* out, int count) {
    std::printf("%s %u", name, word);
    for (int i = 0; i < count; i++) std::printf(" %u %u", out[i] & 0xFFFF, out[i] >> 16);
    std::printf("\n");
}

int main() {
    // Eight different codes a word, every code at every place.
    for (uint32_t shift = 0; shift < 16; shift++) {
        uint32_t word = 0;
        for (uint32_t i = 0; i < 8; i++) word |= (i * 3 + shift) % 16 << 4 * i;
        uint32_t pair[4], half[4];
        e2m1_pairs(word, pair);
        HalfFp4::operand(word, half);
        print_halves("bf16", word, pair, 4);
        print_halves("fp16", word, half, 4);
    }
    for (uint32_t code = 0; code < 256; code++) {
        uint32_t bits = e8m0_bits(code);
        float value;
        std::memcpy(&value, &bits, sizeof value);
        std::printf("e8m0 %u %.17g %.17g\n", code, value, bf16_value(bits >> 16));
    }
    // Which columns of an activation row meet which code: column i holds the number i.
    uint4 x[2] = {{0x00010000, 0x00030002, 0x00050004, 0x00070006},
                  {0x00090008, 0x000B000A, 0x000D000C, 0x000F000E}};
    uint32_t b[Fp4Chunk::kProducts][2];
    Fp4Chunk::column(x, b);
    print_halves("columns", 0, &b[0][0], 2 * Fp4Chunk::kProducts);
    return 0;
}
