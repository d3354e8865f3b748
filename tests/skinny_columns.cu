// Prints where the kernel of linear for a few to 64 rows puts activations (csrc/cuda/skinny.cuh), for
// test_cuda_skinny.py.
//
// Lines "columns FORMAT step half j member e low high": which columns of a stage meet register e of product j
// of half a chunk.
#include <cstdio>
#include <cstring>

#include "../csrc/cuda/elements.cuh"
#include "../csrc/cuda/skinny.cuh"

using namespace dsv4;

template <class Policy> static void print(const char* format) {
    using Stage = StageColumns<Policy, 16>;
    static Stage stage;
    constexpr int kToken = 11;
    for (int v = 0; v < Stage::kVectors; v++) {
        uint16_t columns[8];
        for (int i = 0; i < 8; i++) columns[i] = 8 * v + i;
        uint4 x;
        std::memcpy(&x, columns, sizeof x);
        stage.put(kToken, v, x);
    }
    for (int i = 0; i < 4 * Policy::kProducts; i++)
        for (int member = 0; member < 4; member++)
            for (int e = 0; e < 2; e++) {
                const int step = i / Policy::kProducts / 2, half = i / Policy::kProducts % 2;
                const int j = i % Policy::kProducts;
                // The line of 128 bytes of the token, its chunks exchanged by the line's number.
                const size_t at = 16 * (Stage::operand(Stage::product(step, half, 0)) +
                                        Stage::operand(Stage::product(0, 0, j)));
                const size_t line = at / 128 + kToken, chunk = at % 128 / 16 + e;
                uint16_t pair[2];
                std::memcpy(pair, (char*)&stage + line * 128 + (chunk ^ line % 8) * 16 + member * 4, 4);
                std::printf("columns %s %d %d %d %d %d %d %d\n", format, step, half, j, member, e, pair[0],
                            pair[1]);
            }
}

int main() {
    print<Nvfp4>("fp4");
    print<Fp8<float>>("fp8");
    print<Bf16>("bf16");
    return 0;
}
