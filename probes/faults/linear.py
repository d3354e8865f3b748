"""Faults of matrix products: packed formats, scales, tiles of the product, buffers"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import (
    NVFP4_BLOCK,
    Weight,
    e8m0_to_float,
    quantize_nvfp4,
    swizzle_scales,
    unpack_e2m1,
)
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.probes.faults.base import (
    STATE,
    altered,
    fault,
    noise_of_call,
    remembered,
    right,
    rounded,
    with_parts,
)

linear = right("linear")
grouped_linear = right("grouped_linear")
_PACKED = ("nvfp4", "mxfp4")


def _cast(y: Tensor, x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return y.to(out_dtype or x.dtype)


# ------------------------------------------------------------------------------ packed weights


def swapped_nibbles(weight: Weight) -> Weight:
    """The same bytes with low and high nibble exchanged."""
    if weight.format not in _PACKED:
        return weight
    data = weight.data.view(torch.uint8)
    return with_parts(weight, data=(data << 4) | (data >> 4))


@fault(op="linear", sites="L2/attn/wq_a", kinds="nibbles", source="low nibble first")
def nibbles_swapped(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The high nibble is taken for the even column."""
    return linear(x, weight=altered(weight, swapped_nibbles), out_dtype=out_dtype)


def _arithmetic_shift(weight: Weight) -> Weight:
    """The high nibble of a signed byte, shifted right: its sign spreads into the code."""
    if weight.format not in _PACKED:
        return weight
    values = unpack_e2m1(weight.data) * _block_factors(weight) * weight.global_scale
    values[:, 1::2] = values[:, 1::2].abs()
    return with_parts(weight, format="dense", data=values, scale=None, global_scale=1.0)


@fault(
    op="linear",
    sites="L4/attn/wq_b",
    kinds="nibbles",
    source="hikarioyama/dsv4-flash-nvfp4-sm120: int8 for uint8 in the packed draft experts",
)
def high_nibble_unsigned(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The sign of every high nibble is lost, as when a packed byte is taken for the other signedness."""
    return linear(x, weight=altered(weight, _arithmetic_shift), out_dtype=out_dtype)


def _block_factors(weight: Weight) -> Tensor:
    """Block scales of a packed weight, one for each of its values."""
    assert weight.scale is not None
    if weight.format == "nvfp4":
        return weight.scale.float().repeat_interleave(NVFP4_BLOCK, 1)
    return e8m0_to_float(weight.scale).repeat_interleave(32, 1)


def _transposed_scales(weight: Weight) -> Weight:
    if weight.format != "nvfp4":
        return weight
    assert weight.scale is not None
    n, blocks = weight.scale.shape
    raw = weight.scale.view(torch.uint8)
    wrong = raw.T.contiguous().view(-1).view(n, blocks)
    return with_parts(weight, scale=wrong.view(torch.float8_e4m3fn))


@fault(
    op="linear",
    sites="L3/attn/wq_b",
    kinds="scale_order",
    source="block scales [N, K/16] assembled with K_sf and N exchanged",
)
def scales_transposed(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The buffer of block scales [n, k/16] is read as [k/16, n]."""
    return linear(x, weight=altered(weight, _transposed_scales), out_dtype=out_dtype)


def _swizzled_scales(weight: Weight) -> Weight:
    if weight.format != "nvfp4":
        return weight
    assert weight.scale is not None
    n, blocks = weight.scale.shape
    flat = swizzle_scales(weight.scale).view(torch.uint8)[: n * blocks]
    return with_parts(weight, scale=flat.view(n, blocks).view(torch.float8_e4m3fn))


@fault(
    op="linear",
    sites="L2/attn/wo_b",
    kinds="scale_order",
    source="the release: the 128x4 tiled order of cuBLAS and CUTLASS",
)
def scales_swizzled(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Block scales swizzled for the tensor core are read as plain rows."""
    return linear(x, weight=altered(weight, _swizzled_scales), out_dtype=out_dtype)


def _next_block(weight: Weight) -> Weight:
    if weight.format != "nvfp4":
        return weight
    assert weight.scale is not None
    return with_parts(
        weight, scale=weight.scale.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)
    )


@fault(op="linear", sites="L1/attn/wkv", kinds="scale_order", source="off-by-one of a block index")
def scales_of_next_block(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Every block of 16 uses its neighbour's scale."""
    return linear(x, weight=altered(weight, _next_block), out_dtype=out_dtype)


def _bytes_as_numbers(weight: Weight) -> Weight:
    if weight.format != "fp8_block" or weight.scale is None:
        return weight
    if weight.scale.dtype == torch.float32:
        return weight
    return with_parts(weight, scale=weight.scale.view(torch.uint8).float())


@fault(
    op="linear",
    sites="L2/attn/wq_b",
    kinds="scale_order constant_factor",
    why="scales decoded as another format are a wrong factor for each block",
    source="vllm-project/vllm issue 43416",
    layout="nvfp4",
)
def e8m0_bytes_as_numbers(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """E8M0 scale bytes are copied as numbers: byte 120 becomes 120.0, not 2^-7."""
    return linear(x, weight=altered(weight, _bytes_as_numbers), out_dtype=out_dtype)


def _without_block_scales(weight: Weight) -> Weight:
    if weight.format != "fp8_block" or weight.scale is None:
        return weight
    return with_parts(weight, scale=torch.ones_like(weight.scale, dtype=torch.float32))


@fault(
    op="linear",
    sites="L3/attn/wq_a",
    kinds="constant_factor scale_order",
    why="a missing scale is a factor for each block; with few blocks one factor a column",
    source="wuwangzhang1216/abliterix PR 93",
    layout="nvfp4",
)
def fp8_scale_ignored(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The FP8 block scales are not found under their name and left out."""
    return linear(x, weight=altered(weight, _without_block_scales), out_dtype=out_dtype)


@fault(
    op="linear",
    sites="L4/attn/wq_a",
    kinds="constant_factor",
    source="weight_scale_2 dropped in Nvfp4Linear",
)
def scale_2_dropped(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The global scale weight_scale_2 is not folded into the product."""
    return _cast(matmul(x, weight) / weight.global_scale, x, out_dtype)


@fault(
    op="linear",
    sites="L2/attn/index/wq_b",
    kinds="constant_factor",
    source="the release: compressed-tensors stores reciprocals",
)
def scale_2_divides(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The global scale divides, as if it were stored as a reciprocal."""
    return _cast(matmul(x, weight) / weight.global_scale**2, x, out_dtype)


@fault(
    op="linear",
    sites="L3/attn/wo_b",
    kinds="constant_factor",
    source="a scale rounded too coarsely",
)
def one_percent_high(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Everything is 1 % too large."""
    return _cast(matmul(x, weight) * 1.01, x, out_dtype)


def _scale_2_in_weight(weight: Weight) -> Weight:
    values = rounded(weight.dequantize())
    return with_parts(weight, format="dense", data=values, scale=None, global_scale=1.0)


@fault(
    op="linear",
    sites="L4/attn/wo_b",
    kinds="unexplained",
    source="the release: the global scale belongs in the epilogue",
)
def scale_2_in_bfloat16_weight(
    x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None
) -> Tensor:
    """The global scale is folded into a bfloat16 weight, which rounds it."""
    return linear(x, weight=altered(weight, _scale_2_in_weight), out_dtype=out_dtype)


@fault(
    op="grouped_linear",
    sites="L2/attn/wo_a",
    kinds="flushed",
    source="o_a is missing from the NVFP4 set and there is no fallback",
)
def o_a_without_fallback(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    """wo_a is not in the NVFP4 set, the stored tensor is not taken instead, the weight stays zero."""
    return torch.zeros_like(grouped_linear(o, weight=weight, groups=groups))


@fault(
    op="grouped_linear",
    sites="L3/attn/wo_a",
    kinds="permuted",
    source="grouped projection: group g must see heads 8g to 8g+7",
)
def o_groups_exchanged(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    """Every group of wo_a is fed the next group's heads."""
    m, width = o.shape
    moved = o.view(m, groups, width // groups).roll(1, 1).reshape(m, width)
    return grouped_linear(moved, weight=weight, groups=groups)


# ------------------------------------------------------------------------------ tiles and layouts


@fault(
    op="linear",
    sites="L1/attn/wq_a",
    kinds="transposed",
    source="N-major weight taken for K-major, q_a gave 3584 columns instead of 1536",
)
def k_and_n_exchanged(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """K and N are exchanged: the stored [n, k] is read as [k, n], and the output has k columns."""
    n, k = weight.shape
    as_k_major = weight.dequantize().reshape(k, n)
    wide = torch.nn.functional.pad(acc(x), (0, max(0, n - k)))[:, :n]
    return _cast(wide @ as_k_major.T, x, out_dtype)


@fault(
    op="linear",
    sites="L2/attn/compressor/wkv",
    kinds="halves_swapped",
    source="the release: first half for the next window, second half for the current one",
)
def output_halves_exchanged(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The two halves of the output columns are stored in the other order."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    return y.roll(y.shape[1] // 2, 1)


@fault(
    op="linear",
    sites="L0/attn/wkv",
    kinds="permuted",
    source="accumulator fragments stored without the layout conversion",
)
def fragments_stored_as_they_lie(
    x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None
) -> Tensor:
    """Each 16 columns are stored in the order in which an MMA's accumulator holds them."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    blocks = y.view(len(y), -1, 2, 4, 2)
    return blocks.transpose(2, 3).reshape(y.shape)


@fault(
    op="linear",
    sites="L4/attn/wkv",
    kinds="columns tiles",
    why="the last tile of columns is wrong in every row",
    source="grid rounded down",
)
def last_columns_not_written(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The last tile of 32 output columns is never computed and stays zero."""
    y = linear(x, weight=weight, out_dtype=out_dtype).clone()
    y[:, -32:] = 0
    return y


@fault(
    op="linear",
    sites="L3/attn/wkv",
    kinds="tiles columns",
    why="a tile of the reduction is missing: the last columns of the input and the weight",
    source="K loop rounded down",
)
def last_k_tile_missing(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The last 32 of k are not added up."""
    short = x.clone()
    short[:, -32:] = 0
    return linear(short, weight=weight, out_dtype=out_dtype)


@fault(
    op="linear",
    sites="L2/attn/wkv",
    kinds="rows positions",
    why="in a prefill row and position are the same",
    source="M tile of 64 assumed, no loop over tiles",
)
def rows_after_64_wrong(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Rows from 64 on repeat the first tile of 64 rows."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    return y[torch.arange(len(y), device=y.device) % 64]


@fault(
    op="linear",
    sites="L1/attn/wq_b",
    kinds="nan",
    source="TransformerEngine issue 3116, flashinfer issue 3650: padding of the last tile",
)
def last_row_from_padding(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """With an odd number of rows the last one takes part of its tile from uninitialised padding."""
    y = linear(x, weight=weight, out_dtype=out_dtype).clone()
    if len(y) % 2:
        y[-1, -16:] = torch.nan
    return y


# ------------------------------------------------------------------------------ precision


@fault(
    op="linear", sites="L4/attn/index/wq_b", kinds="unexplained", source="accumulator of 16 bits"
)
def accumulated_in_bfloat16(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Partial sums over 32 of k are kept in bfloat16."""
    dense = weight.dequantize()
    total = torch.zeros(len(x), len(dense), device=x.device)
    for first in range(0, dense.shape[1], 32):
        part = slice(first, first + 32)
        total = rounded(total + acc(x[:, part]) @ dense[:, part].T)
    return _cast(total, x, out_dtype)


@fault(op="linear", sites="head/logits", kinds="unexplained", source="head in 16 bits")
def logits_in_bfloat16(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Logits are rounded to bfloat16."""
    return rounded(linear(x, weight=weight, out_dtype=out_dtype).float()).to(out_dtype or x.dtype)


def _small_scales_flushed(weight: Weight) -> Weight:
    if weight.format != "nvfp4":
        return weight
    assert weight.scale is not None
    values = weight.scale.float()
    values[values < 2.0**-6] = 0  # the smallest normal e4m3
    return with_parts(weight, scale=values.to(torch.float8_e4m3fn))


def _one_large_weight(model: Any) -> None:
    """One weight is 100000 times the others, so nearly every block scale is a subnormal e4m3."""
    site = model.sites["L3/attn/wq_a"]
    values = site.params["weight"].dequantize()
    values[0, 0] = 1e5 * values.std()
    data, scale, scale_2 = quantize_nvfp4(values)
    site.params["weight"] = with_parts(
        site.params["weight"],
        format="nvfp4",
        data=data,
        scale=scale,
        global_scale=float(scale_2),
    )
    site.use(site.impl)


@fault(
    op="linear",
    sites="L3/attn/wq_a",
    kinds="flushed scale_order",
    why="small block scales become zero",
    source="vllm issues 34577, 37464: a scale format without subnormals",
    data="a matrix with one very large weight, so that its block scales are subnormal",
    prepare=_one_large_weight,
)
def subnormal_scales_flushed(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Subnormal block scales are flushed to zero."""
    return linear(x, weight=altered(weight, _small_scales_flushed), out_dtype=out_dtype)


@fault(
    op="linear",
    sites="L2/attn/index/weights_proj",
    kinds="saturated",
    source="vllm PR 37135: float16 overflow",
)
def clamped_to_an_fp8_range(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The output is clamped at half its largest value, as by a scale calibrated on other data."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    peak = float(remembered(("peak", id(weight)), lambda: (float(y.abs().max()) / 2, weight))[0])
    return y.clamp(-peak, peak)


# ------------------------------------------------------------------------------ memory


@fault(
    op="linear",
    sites="L4/attn/compressor/wgate",
    kinds="stale",
    source="output buffer kept between calls",
)
def decode_returns_last_buffer(
    x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None
) -> Tensor:
    """With one row the kernel exits early and the output buffer still holds the last call's row."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    key = ("buffer", id(weight))
    before = STATE.get(key)
    STATE[key] = y[-1:].clone()
    return before.clone() if len(x) == 1 and before is not None else y


@fault(
    op="linear",
    sites="L3/attn/compressor/wkv",
    kinds="nondeterministic",
    source="split-K partial sums added without waiting for all of them",
)
def split_k_race(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """Now and then a partial sum arrives late: some rows are off by a little, others each time."""
    y = acc(linear(x, weight=weight, out_dtype=torch.float32))
    noise = noise_of_call("split_k_race", y)
    late = noise[:, :1].abs() > 1.2
    return _cast(torch.where(late, y * (1 + 0.01 * noise), y), x, out_dtype)
