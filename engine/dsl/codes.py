"""Weights of each coded format as bfloat16 operands of wgmma, in CuTe-DSL: what linear_sm90.py decodes with.

A format says how wide a code is, in which `unit` a thread reads codes from a stage in shared memory,
how the scales of a step are read and made into factors, and how a thread gets the four columns of a
weight row that its place in wgmma's first operand asks for.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint16, Uint32, Uint64
from cutlass.cute.nvgpu import warpgroup

COLUMNS = 64  # contracted columns of a step
PRODUCTS = COLUMNS // 16  # of a step


# ------------------------------------------------------------------------------ decoding


@cute.jit
def product_of_pairs(a: Uint32, b: Uint32) -> Uint32:
    """Two bfloat16 products."""
    return cute.arch.inline_ptx(  # the instruction takes no immediate
        "{ .reg .b32 b; mov.b32 b, {$r1}; mul.rn.bf16x2 {$w0}, {$r0}, b; }",
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


@cute.jit
def e4m3_pair(codes: Uint16) -> Uint32:
    """Two e4m3 as two bfloat16, exactly, NaN included."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 h; .reg .b16 l, u; .reg .f32 a, b;"
        " cvt.rn.f16x2.e4m3x2 h, {$r0}; mov.b32 {l, u}, h;"
        " cvt.f32.f16 a, l; cvt.f32.f16 b, u; cvt.rn.bf16x2.f32 {$w0}, b, a; }",
        write_only_types=[Uint32],
        read_only_args=[codes],
    )


@cute.jit
def e2m1_pair(word: Uint32, shifted: Uint32, selector: Uint32) -> Uint32:
    """Byte `selector` % 8 of `word` as two bfloat16, times 2^-126; `shifted` is word << 4.

    Exponent and mantissa of the code keep their meaning at the bottom of bfloat16's fields.
    """
    x = Uint32(cute.arch.prmt(word, shifted, selector))
    return (x & Uint32(0x80008000)) | ((x >> 6) & Uint32(0x01C001C0))


@cute.jit
def e8m0_pair(code: Uint32) -> Uint32:
    """2^(code - 127) as two equal bfloat16: code 0 is a subnormal, 255 is NaN."""
    bits = code << 7
    if code == 0:
        bits = Uint32(0x0040)
    if code == 255:
        bits = Uint32(0x7FC0)
    return bits | (bits << 16)


# ------------------------------------------------------------------------------ formats


class Nvfp4:
    """e2m1 codes with an e4m3 scale every 16 columns. The product is 2^-7 of what it stands for."""

    bits, unit, scale_type = 4, Uint64, Uint32
    swizzle = warpgroup.SmemLayoutAtomKind.K_SW32
    factor = 128.0

    @staticmethod
    def scale_tensor(scale: cute.Pointer, n: Int32, k: Int32) -> cute.Tensor:
        steps = k // COLUMNS
        return cute.make_tensor(scale, cute.make_layout((n, steps), stride=(steps, 1)))

    @staticmethod
    def read_scale(scales: cute.Tensor, row: Int32, step: Int32):
        return Uint32(scales[row, step])

    @staticmethod
    def factors(raw: Uint32) -> list:
        """The scale of each product, times 2^119."""
        up = Float32(2.0**119)
        return [
            cute.arch.inline_ptx(
                "{ .reg .b32 h; .reg .b16 p, l, u; .reg .f32 a; mov.b32 {l, u}, {$r0};"
                f" mov.b16 p, {'lu'[i // 2]}; cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {{l, u}}, h;"
                f" cvt.f32.f16 a, {'lu'[i % 2]}; mul.f32 a, a, {{$r1}};"
                " cvt.rn.bf16x2.f32 {$w0}, a, a; }",
                write_only_types=[Uint32],
                read_only_args=[raw, up],
            )
            for i in range(PRODUCTS)
        ]

    @staticmethod
    def operand(
        codes: cute.Tensor, row: Int32, i: int, stage: Int32, member: Int32, factor
    ) -> tuple:
        """The thread's four columns of product `i` in a weight row: two pairs of bfloat16."""
        both = Uint64(codes[row, i ^ (row >> 2 & 1) * 2, stage])  # the swizzle: 16 bytes by row / 4
        selector = Uint32(0x40) + Uint32(member % 4) * Uint32(0x1111)
        pairs = []
        for word in (Uint32(both), Uint32(both >> 32)):
            pairs.append(product_of_pairs(e2m1_pair(word, word << 4, selector), factor))
        return tuple(pairs)


class Mxfp4(Nvfp4):
    """e2m1 codes with an e8m0 scale every 32 columns."""

    scale_type = Uint16
    factor = 1.0

    @staticmethod
    def factors(raw: Uint32) -> list:
        pairs = [e8m0_pair(raw & 0xFF), e8m0_pair(raw >> 8)]
        return [pairs[i // 2] for i in range(PRODUCTS)]

    @staticmethod
    def operand(
        codes: cute.Tensor, row: Int32, i: int, stage: Int32, member: Int32, factor
    ) -> tuple:
        # The scale may reach 2^127: 2^126 is a product of its own.
        up = Uint32(0x7E807E80)
        return tuple(
            product_of_pairs(pair, factor)
            for pair in Nvfp4.operand(codes, row, i, stage, member, up)
        )


class Fp8:
    """e4m3 codes with an e8m0 scale every 128 x 128."""

    bits, unit, scale_type = 8, Uint16, Uint8
    swizzle = warpgroup.SmemLayoutAtomKind.K_SW64
    factor = 1.0

    @staticmethod
    def scale_tensor(scale: cute.Pointer, n: Int32, k: Int32) -> cute.Tensor:
        across = cute.ceil_div(k, 128)
        layout = cute.make_layout((cute.ceil_div(n, 128), across), stride=(across, 1))
        return cute.make_tensor(scale, layout)

    @staticmethod
    def read_scale(scales: cute.Tensor, row: Int32, step: Int32):
        return Uint32(scales[row // 128, step * COLUMNS // 128])

    @staticmethod
    def factors(raw: Uint32) -> list:
        return [e8m0_pair(raw)] * PRODUCTS

    @staticmethod
    def operand(
        codes: cute.Tensor, row: Int32, i: int, stage: Int32, member: Int32, factor
    ) -> tuple:
        pair = 8 * (i ^ (row >> 1 & 3)) + member % 4  # the swizzle: 16 bytes by row / 2
        low, high = codes[row, pair, stage], codes[row, pair + 4, stage]
        return tuple(product_of_pairs(e4m3_pair(Uint16(c)), factor) for c in (low, high))
