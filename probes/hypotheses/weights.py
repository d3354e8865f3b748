"""A stored weight misread: nibbles, block scales, global scale, order of rows and columns"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight, e8m0_to_float, swizzle_scales, unswizzle_scales

Change = tuple[str, str, Weight]  # kind, words, the weight as it was read


def changed_weights(weight: Weight) -> Iterator[Change]:
    """Every way to misread `weight`, the most specific first."""
    if weight.format in ("nvfp4", "mxfp4"):
        raw = weight.data.view(torch.uint8)
        swapped = (raw >> 4) | (raw << 4)
        yield "nibbles", "low and high nibble are exchanged", _with(weight, data=swapped)
        for mask, words in ((0x7F, "high nibbles"), (0xF7, "low nibbles"), (0x77, "codes")):
            yield "nibbles", f"the sign of its {words} is ignored", _with(weight, data=raw & mask)
        yield (
            "nibbles",
            "both nibbles are read as the low one",
            _with(weight, data=raw & 0xF | raw << 4),
        )
        yield (
            "nibbles",
            "both nibbles are read as the high one",
            _with(weight, data=raw & 0xF0 | raw >> 4),
        )
        yield from _integers(weight, raw)
    if weight.scale is not None:
        yield from _scales(weight, weight.scale)
    yield from _global(weight)
    yield from _order(weight)


def _integers(weight: Weight, raw: Tensor) -> Iterator[Change]:
    """The codes taken for 4-bit integers, with the block scales they have."""
    codes = torch.stack((raw & 0xF, raw >> 4), -1).flatten(1).float()  # [n, k]
    if weight.scale is None:
        return
    step = weight.shape[1] // weight.scale.shape[1]
    scale = weight.scale.float() if weight.format == "nvfp4" else e8m0_to_float(weight.scale)
    factors = scale.repeat_interleave(step, 1) * weight.global_scale
    for words, values in (
        ("two's complement integers", torch.where(codes > 7, codes - 16, codes)),
        ("unsigned integers", codes),
        ("integers with a sign bit", torch.where(codes > 7, 8 - codes, codes)),
    ):
        dense = Weight(weight.name, "dense", values * factors)
        yield "nibbles", f"its codes are decoded as {words}", dense


def _with(weight: Weight, **changes: object) -> Weight:
    return replace(weight, _dense=None, **changes)  # type: ignore[arg-type]


def _scales(weight: Weight, scale: Tensor) -> Iterator[Change]:
    """Block scales in another order, or of another format; all of one shape and dtype."""
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    rows, cols = raw.shape

    def read(words: str, changed: Tensor) -> Change:
        changed = changed.contiguous()
        back = changed.view(scale.dtype) if changed.dtype == torch.uint8 else changed
        return "scale_order", f"block scales are {words}", _with(weight, scale=back)

    if rows > 1 and cols > 1:
        yield read("read transposed", raw.T.reshape(rows, cols))
        columnwise = raw.reshape(cols, rows).T
        yield read("stored transposed", columnwise)
    if rows == cols > 1:
        yield read("transposed", raw.T)
    if raw.dtype == torch.uint8:
        yield from _swizzled(weight, raw, read)
    for axis, label in ((0, "row"), (1, "column")):
        if raw.shape[axis] > 1:
            for shift in (1, -1):
                yield read(f"shifted by {shift} {label}", raw.roll(shift, axis))
            yield read(f"read with {label}s in reverse", raw.flip(axis))
    if rows % 2 == 0 and rows > 1:
        yield read("read with their upper and lower half exchanged", raw.roll(rows // 2, 0))
    if cols % 2 == 0:
        pairs = raw.view(rows, cols // 2, 2).flip(-1).reshape(rows, cols)
        yield read("exchanged between neighbours", pairs)
    first = raw[:, :1].expand_as(raw)
    yield read("those of each row's first block", first)
    yield read("those of the first row", raw[:1].expand_as(raw))
    yield from _decoded(weight, scale)


def _swizzled(weight: Weight, raw: Tensor, read: object) -> Iterator[Change]:
    """The 128x4 tiled order where the plain one is meant, and the other way round."""
    assert callable(read)
    rows, cols = raw.shape
    flat = swizzle_scales(raw)
    yield read("in the swizzled 128x4 order", flat[: rows * cols].view(rows, cols))
    padded = raw.new_zeros(flat.numel())
    padded[: rows * cols] = raw.flatten()
    yield read("taken to be swizzled (128x4)", unswizzle_scales(padded, rows, cols))


def _decoded(weight: Weight, scale: Tensor) -> Iterator[Change]:
    """The scales' bytes decoded as another format, or not used."""
    if weight.format == "nvfp4":
        codes = scale.view(torch.uint8)
        ones = torch.ones_like(scale.float()).to(scale.dtype)
        yield "scale_order", "block scales are left out", _with(weight, scale=ones)
        as_e8m0 = e8m0_to_float(codes)
        yield "scale_order", "block scales are decoded as e8m0", _with(weight, scale=as_e8m0)
        yield (
            "scale_order",
            "block scales are used as integers",
            _with(weight, scale=codes.float()),
        )
        powers = torch.exp2(scale.float().clamp(min=2.0**-9).log2().round())
        yield "scale_order", "block scales are rounded to powers of 2", _with(weight, scale=powers)
        zero_subnormal = torch.where(scale.float() < 2.0**-6, 0.0, scale.float())
        yield (
            "flushed",
            "subnormal block scales are taken as 0",
            _with(weight, scale=zero_subnormal),
        )
        return
    one_byte = scale.element_size() == 1
    neutral_bytes = torch.full_like(scale.view(torch.uint8), 127) if one_byte else None
    if weight.format == "mxfp4":
        values = e8m0_to_float(scale).clamp(max=448).to(torch.float8_e4m3fn).float()
        copied = _with(weight, format="nvfp4", scale=values.repeat_interleave(2, 1))
        yield "scale_order", "block scales are copied into e4m3", copied
    if neutral_bytes is not None:
        neutral = neutral_bytes.view(scale.dtype)
        yield "scale_order", "block scales are left out", _with(weight, scale=neutral)
    elif scale.dtype == torch.float32:
        yield "scale_order", "block scales are left out", _with(weight, scale=scale * 0 + 1)
        yield "scale_order", "block scales divide", _with(weight, scale=1 / scale)


def _global(weight: Weight) -> Iterator[Change]:
    g = weight.global_scale
    if weight.format != "nvfp4" or g in (0.0, 1.0):
        return
    for words, value in (
        ("left out", 1.0),
        ("applied twice", g * g),
        ("divided by", 1 / g),
        ("read as its square root", abs(g) ** 0.5),
    ):
        yield "constant_factor", f"the global scale is {words}", _with(weight, global_scale=value)
    if weight.input_scale not in (None, 0.0):
        product = g * weight.input_scale
        yield (
            "constant_factor",
            "the input scale is applied to it",
            _with(weight, global_scale=product),
        )


def _order(weight: Weight) -> Iterator[Change]:
    """Rows or columns of the whole matrix in another order, scales with them."""
    n, k = weight.shape
    dense = weight.dequantize()

    def plain(kind: str, words: str, value: Tensor) -> Change:
        return kind, words, Weight(weight.name, "dense", value.contiguous())

    if n == k:
        yield plain("transposed", "it is read transposed", dense.T)
    yield plain("transposed", "it is read column by column", dense.T.reshape(n, k))
    yield plain("transposed", "it is stored column by column", dense.reshape(k, n).T)
    if k % 2 == 0:
        yield plain(
            "halves_swapped", "its left and right half are exchanged", dense.roll(k // 2, 1)
        )
        pairs = dense.view(n, k // 2, 2).flip(-1).reshape(n, k)
        yield plain("nibbles", "neighbouring columns are exchanged", pairs)
        mixed = dense.view(n, 2, k // 2).transpose(1, 2).reshape(n, k)
        yield plain("permuted", "the halves of its columns are interleaved", mixed)
        split = dense.view(n, k // 2, 2).transpose(1, 2).reshape(n, k)
        yield plain("permuted", "even columns are read before odd ones", split)
    if n % 2 == 0:
        yield plain(
            "halves_swapped", "its upper and lower half are exchanged", dense.roll(n // 2, 0)
        )
    for shift in (1, -1):
        yield plain("shifted", f"it is shifted by {shift} column", dense.roll(shift, 1))
        yield plain("shifted", f"it is shifted by {shift} row", dense.roll(shift, 0))
