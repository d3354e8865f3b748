"""Number formats against hand-computed values and float64 oracles written without the library."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine.formats import (
    DenseCache,
    Weight,
    e4m3_to_float,
    e8m0_to_float,
    float_to_e8m0,
    pack_e2m1,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
    swizzle_scales,
    unpack_e2m1,
    unswizzle_scales,
)

# Written out from the format's definition: s eem -> value.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def e4m3(code: int) -> float:
    """The value of an e4m3fn code, from its bits."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def bytes_(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=rng)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


# ------------------------------------------------------------------------------ elements


def test_every_byte_unpacks_low_nibble_first() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    wanted = [[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)]
    assert same_bits(unpack_e2m1(every), torch.tensor(wanted))  # bits: -0 is not 0
    assert same_bits(unpack_e2m1(every.view(torch.int8)), torch.tensor(wanted))
    assert same_bits(unpack_e2m1(every.view(torch.float4_e2m1fn_x2)), torch.tensor(wanted))


def test_packing_is_the_inverse_of_unpacking_for_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        # midpoints go to the even code: 0 1 1 2 2 4 4 -> codes 0 2 2 4 4 6 6
        (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6),
        (0.2500001, 1), (0.7499999, 1), (1.2500001, 3), (1.7499999, 3), (2.5000002, 5),
        (3.4999998, 5), (5.0000005, 7), (4.9999995, 6), (6.0, 7), (1e9, 7), (math.inf, 7),
        (0.0, 0), (1e-30, 0), (-0.0, 8), (-0.25, 8), (-0.2500001, 9), (-5.0, 14), (-7.0, 15),
    ],
)  # fmt: skip
def test_rounding_to_e2m1(value: float, code: int) -> None:
    packed = pack_e2m1(torch.tensor([[value, 0.0], [0.0, value]]))
    assert packed.tolist() == [[code], [code << 4]]


def test_rounding_to_e2m1_is_to_the_nearest() -> None:
    values = torch.linspace(-7, 7, 20001, dtype=torch.float64)
    table = torch.tensor(E2M1, dtype=torch.float64)
    best = (values[:, None] - table).abs().min(1).values
    rounded = unpack_e2m1(pack_e2m1(torch.stack((values, values), 1).float()))[:, 0].double()
    torch.testing.assert_close((values - rounded).abs(), best, rtol=0, atol=1e-6)


def test_every_e4m3_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = e4m3_to_float(codes.view(torch.float8_e4m3fn)[None])[0]
    wanted = torch.tensor([e4m3(c) for c in range(256)])
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same_bits(got.nan_to_num(7), wanted.nan_to_num(7))
    assert got.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_every_e8m0_byte() -> None:
    got = e8m0_to_float(torch.arange(256, dtype=torch.uint8))
    for byte in range(255):
        assert float(got[byte]) == 2.0 ** (byte - 127), byte  # byte 0 is subnormal in float32
    assert math.isnan(float(got[255]))
    back = float_to_e8m0(got[:255]).view(torch.uint8)
    assert back.tolist() == list(range(255))


# ------------------------------------------------------------------------------ matrices


def oracle(weight: Weight) -> Tensor:
    """float64 dequantisation, element by element from the definition; nothing is shared."""
    n, k = weight.shape
    out = torch.zeros(n, k, dtype=torch.float64)
    data = weight.data.view(torch.uint8).tolist()
    scale = weight.scale
    assert scale is not None
    raw = scale.tolist() if scale.dtype == torch.float32 else scale.view(torch.uint8).tolist()
    for row in range(n):
        for col in range(k):
            if weight.format == "fp8_block":
                s = raw[row // 128][col // 128]
                factor = s if scale.dtype == torch.float32 else 2.0 ** (s - 127)
                out[row, col] = e4m3(data[row][col]) * factor
                continue
            code = (data[row][col // 2] >> (4 * (col % 2))) & 15
            if weight.format == "nvfp4":
                factor = e4m3(raw[row][col // 16]) * weight.global_scale
            else:
                factor = 2.0 ** (raw[row][col // 32] - 127)
            out[row, col] = E2M1[code] * factor
    return out


def nvfp4(n: int = 5, k: int = 64, g: float = 3.1e-4) -> Weight:
    scale = random_bytes(n, k // 16, high=0x7F, seed=1).view(torch.float8_e4m3fn)
    return Weight("w", "nvfp4", random_bytes(n, k // 2), scale, g)


def mxfp4(n: int = 5, k: int = 96) -> Weight:
    scale = random_bytes(n, k // 32, low=90, high=140, seed=2).view(torch.float8_e8m0fnu)
    return Weight("w", "mxfp4", random_bytes(n, k // 2), scale)


def fp8(n: int = 130, k: int = 140, floats: bool = False) -> Weight:
    data = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    scale = random_bytes(-(-n // 128), -(-k // 128), low=100, high=130, seed=4)
    form = e8m0_to_float(scale) * 1.37 if floats else scale.view(torch.float8_e8m0fnu)
    return Weight("w", "fp8_block", data, form)


WEIGHTS = {
    "nvfp4": nvfp4(),
    "mxfp4": mxfp4(),
    "fp8": fp8(),
    "fp8, one block": fp8(3, 40),
    "fp8, whole blocks": fp8(128, 256),
    "fp8, float32 scales": fp8(floats=True),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_dequantisation_equals_the_float64_oracle(name: str) -> None:
    weight = WEIGHTS[name]
    truth = oracle(weight)
    got = weight.dequantize()
    assert got.dtype == torch.float32
    assert got.shape == weight.shape
    # One float32 rounding for each of at most two products.
    assert float(((got.double() - truth).abs() / truth.abs().clamp(min=1e-300)).max()) <= 2**-23
    exact = name in ("mxfp4", "fp8", "fp8, one block", "fp8, whole blocks")
    assert torch.equal(got.double(), truth) or not exact


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_equal_the_slice_of_the_whole(name: str) -> None:
    weight = WEIGHTS[name]
    whole, n = weight.dequantize(), weight.shape[0]
    for start, stop in ((0, n), (1, n), (n - 1, n), (n // 3, 2 * n // 3), (n // 2, n)):
        assert torch.equal(weight.dequantize_rows(start, stop), whole[start:stop])


def test_hand_computed_nvfp4() -> None:
    """Bytes 0x21 (0.5, 1), 0xF7 (6, -6); block scale 0x7E = 448; global scale 2^-10."""
    data = torch.zeros(1, 8, dtype=torch.uint8)
    data[0, 0], data[0, 1] = 0x21, 0xF7
    scale = bytes_(0x7E)[None].view(torch.float8_e4m3fn)
    row = Weight("w", "nvfp4", data, scale, 2.0**-10).dequantize()[0]
    assert row[:5].tolist() == [0.21875, 0.4375, 2.625, -2.625, 0.0]


def test_global_scales_multiply() -> None:
    one, half = nvfp4(g=1.0).dequantize(), nvfp4(g=0.5).dequantize()
    assert torch.equal(half, one * 0.5)


def test_block_scales_are_never_negative_powers_of_the_wrong_base() -> None:
    """e8m0 byte 120 is 2^-7; copied as a number it would be 120."""
    weight = Weight("w", "mxfp4", torch.full((1, 16), 0x22, dtype=torch.uint8), bytes_(120)[None])
    weight.scale = bytes_(120)[None].view(torch.float8_e8m0fnu)
    assert weight.dequantize().unique().tolist() == [2.0**-7]


# ------------------------------------------------------------------------------ quantisers


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_nvfp4_quantiser_follows_the_two_level_recipe() -> None:
    weight = gaussian(7, 64)
    weight[0, :16] = 0  # a zero block
    weight[1, :16] *= 1e-7  # a block whose scale is below the smallest e4m3
    data, scale, g = quantize_nvfp4(weight)
    assert float(g) == pytest.approx(float(weight.abs().max()) / 2688, rel=1e-6)
    assert float(scale.float().max()) == 448.0
    assert float(scale[0, 0].float()) == 1.0
    assert float(scale[1, 0].float()) == 2.0**-9
    values = Weight("w", "nvfp4", data, scale, float(g)).dequantize()
    assert torch.equal(values[0, :16], torch.zeros(16))
    # Each value is the nearest of the 16 that its rounded scale allows.
    table = torch.tensor(E2M1, dtype=torch.float64)
    for row in range(7):
        for block in range(4):
            step = float(scale[row, block].float()) * float(g)
            part = weight[row, 16 * block : 16 * block + 16].double()
            best = (part[:, None] - table * step).abs().min(1).values
            mine = (part - values[row, 16 * block : 16 * block + 16].double()).abs()
            torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-8)


def test_mxfp4_quantiser_never_saturates() -> None:
    weight = gaussian(9, 128)
    weight[0, :32] = 6.0  # exactly representable with scale 1
    data, scale = quantize_mxfp4(weight)
    values = Weight("w", "mxfp4", data, scale).dequantize()
    assert torch.equal(values[0, :32], weight[0, :32])
    blocks = weight.view(9, 4, 32)
    step = e8m0_to_float(scale)
    assert bool((blocks.abs().amax(-1) <= 6 * step).all())
    # Half the widest gap (4 to 6) is one step.
    assert bool(((values - weight).view(9, 4, 32).abs().amax(-1) <= step * 1.0001).all())


@pytest.mark.parametrize(("n", "k"), [(128, 128), (130, 140), (1, 300), (256, 64)])
def test_fp8_quantiser_with_ragged_blocks(n: int, k: int) -> None:
    weight = gaussian(n, k)
    data, scale = quantize_fp8_block(weight)
    assert scale.shape == (-(-n // 128), -(-k // 128))
    values = Weight("w", "fp8_block", data, scale).dequantize()
    assert bool(values.isfinite().all())
    error = (values - weight).abs()
    step = e8m0_to_float(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    assert bool((error <= weight.abs() * 2**-4 + step * 2**-10).all())


def test_lossless_conversion_from_mxfp4_to_nvfp4() -> None:
    """With exponents within [max - 17, max], the nibbles stay and dequantisation is equal bit for
    bit: global scale 2^m, m = max - 8, and both 16-halves of a group get 2^(k - m) in e4m3."""
    source = mxfp4(16, 128)
    assert source.scale is not None
    exponents = random_bytes(16, 4, low=103, high=121, seed=9).int() - 127  # 18 neighbours
    source.scale = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    m = int(exponents.max()) - 8
    block = torch.exp2((exponents - m).float()).to(torch.float8_e4m3fn).repeat_interleave(2, dim=1)
    converted = Weight("w", "nvfp4", source.data, block, 2.0**m)
    assert same_bits(converted.dequantize(), source.dequantize())
    assert float(block.float().min()) == 2.0**-9  # the range is used to its end


# ------------------------------------------------------------------------------ swizzle


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (129, 5), (300, 37), (256, 16)])
def test_swizzle_against_the_byte_formula(rows: int, cols: int) -> None:
    scale = random_bytes(rows, cols, seed=rows).view(torch.float8_e4m3fn)
    flat = swizzle_scales(scale).view(torch.uint8)
    col_tiles = -(-cols // 4)
    wanted = torch.zeros(-(-rows // 128) * 128 * col_tiles * 4, dtype=torch.uint8)
    for r in range(rows):
        for c in range(cols):
            tile = 512 * ((r // 128) * col_tiles + c // 4)
            wanted[tile + 16 * (r % 32) + 4 * ((r % 128) // 32) + c % 4] = scale.view(torch.uint8)[
                r, c
            ]
    assert torch.equal(flat, wanted)  # padding is zero
    back = unswizzle_scales(swizzle_scales(scale), rows, cols)
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize(("rows", "cols"), [(128, 4), (300, 37), (384, 8)])
def test_swizzle_equals_torchs_helper(rows: int, cols: int) -> None:
    helpers = pytest.importorskip("torch.testing._internal.common_quantized")
    if not hasattr(helpers, "to_blocked"):
        pytest.skip("this torch has no to_blocked")
    scale = random_bytes(rows, cols, seed=cols)
    assert torch.equal(swizzle_scales(scale), helpers.to_blocked(scale).flatten())


# ------------------------------------------------------------------------------ the cache


def test_dense_cache_keeps_within_its_limit() -> None:
    weights = [nvfp4(8, 64) for _ in range(6)]
    size = 4 * 8 * 64
    cache = DenseCache(limit=4 * size)
    for weight in weights:
        kept = cache.get(weight)
        assert kept is not None
        assert torch.equal(kept, weight.dequantize())
    assert cache.used == 4 * size
    assert [w._dense is not None for w in weights] == [False, False, True, True, True, True]
    cache.get(weights[2])  # used again, so the next to go is number 3
    cache.get(weights[0])
    assert [w._dense is not None for w in weights] == [True, False, True, False, True, True]
    assert DenseCache(limit=size).get(nvfp4(8, 64)) is None
    cache.clear()
    assert cache.used == 0
    assert all(w._dense is None for w in weights)
