"""The packed KV entry: e4m3 values with a scale for every 64, and bfloat16 rope values; 584 bytes.

One entry of a head 512 wide, of which the last 64 dimensions are roped:

| bytes   | hold                                                                       |
|---------|----------------------------------------------------------------------------|
| 0-447   | the 448 dimensions without rope, e4m3, in 7 tiles of 64                    |
| 448-575 | the 64 roped dimensions, bfloat16                                          |
| 576-583 | the scale of each tile, e8m0 (2^(byte - 127)), then 0 up to 8 bytes         |

An entry is contiguous, so a pool is uint8 [rows, 584] and a row can be moved, grown or copied like
one of any other dtype; rows start at multiples of 8 bytes. FlashMLA and vLLM keep the same 576 + 8
bytes in pages, with the data of all entries of a page first and their scales behind it. Other widths
are packed alike: `width` dimensions, the first `plain` of them in tiles, a multiple of 8 and at most
512 (8 tiles).

Source: the release rounds K = V so (act_quant, blocks of 64, scales rounded up to powers of two).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import e8m0_to_float

TILE = 64  # values of one scale
SCALE_BYTES = 8
_LEAST_AMAX = 1e-4  # of a tile, as in the release: the smallest scale is 2^-22
_NAN = 0x7F  # e4m3 has no infinity


def packed_bytes(width: int, rope: int) -> int:
    """Bytes of an entry of `width` dimensions, the last `rope` of them roped. Raises DSV4Error."""
    plain = width - rope
    if not 0 < plain <= TILE * SCALE_BYTES or rope < 8 or plain % 8 or rope % 8:
        raise DSV4Error(
            f"no packed KV entry for {plain} dimensions and {rope} roped ones",
            f"multiples of 8, and at most {TILE * SCALE_BYTES} dimensions without rope",
        )
    return plain + 2 * rope + SCALE_BYTES


def plain_of(width: int, packed: int) -> int:
    """How many of `width` dimensions have no rope, from the bytes of an entry. Raises DSV4Error."""
    plain = 2 * width + SCALE_BYTES - packed
    packed_bytes(width, width - plain)
    return plain


def pack(rows: Tensor, packed: int) -> Tensor:
    """rows [m, width], any floating dtype -> entries uint8 [m, packed].

    A tile's scale s is the smallest power of two with amax <= 448 s, amax being the largest finite
    magnitude or 1e-4; a value becomes the e4m3 nearest to v / s, ties to even. So each comes back
    within max(|v| / 16, s / 1024), and exactly if it is s times an e4m3. NaN and infinity become
    NaN where they stand and change no other value; among the roped dimensions they are kept.
    """
    m, width = rows.shape
    plain = plain_of(width, packed)
    values = rows.new_zeros(m, -(-plain // TILE) * TILE, dtype=torch.float32)
    values[:, :plain] = rows[:, :plain]
    tiles = values.view(m, values.shape[1] // TILE, TILE)
    finite = tiles.isfinite()
    amax = torch.where(finite, tiles.abs(), 0.0).amax(-1).clamp(min=_LEAST_AMAX)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa 2^exponent, and 448 = 0.875 2^9
    exponent = exponent - 9 + (mantissa > 0.875)  # of s
    inverse = (127 - exponent << 23).view(torch.float32)  # 1 / s, from its bits: exact everywhere
    codes = (tiles * inverse[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(finite, codes, _NAN)
    entries = rows.new_zeros(m, packed, dtype=torch.uint8)
    entries[:, :plain] = codes.flatten(1)[:, :plain]
    rope = rows[:, plain:].to(torch.bfloat16).contiguous()
    entries[:, plain : packed - SCALE_BYTES] = rope.view(torch.uint8)
    entries[:, packed - SCALE_BYTES :][:, : tiles.shape[1]] = (exponent + 127).to(torch.uint8)
    return entries


def unpack(entries: Tensor, width: int) -> Tensor:
    """entries uint8 [..., packed] -> float32 [..., width]; each value is exact in bfloat16 too,
    for the scales that `pack` makes."""
    packed = entries.shape[-1]
    plain = plain_of(width, packed)
    scales = entries[..., packed - SCALE_BYTES :][..., : -(-plain // TILE)]
    factors = e8m0_to_float(scales.contiguous()).repeat_interleave(TILE, -1)[..., :plain]
    codes = entries[..., :plain].contiguous().view(torch.float8_e4m3fn).float()
    rope = entries[..., plain : packed - SCALE_BYTES].contiguous().view(torch.bfloat16).float()
    return torch.cat((codes * factors, rope), dim=-1)
