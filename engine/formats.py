"""Number formats of DeepSeek-V4 checkpoints: pack, unpack, quantise, dequantise, swizzle.

A matrix W is [n, k], stored N-major with k contiguous.

| format    | element                 | scale                              | value                     |
|-----------|-------------------------|------------------------------------|---------------------------|
| nvfp4     | e2m1, two a byte        | e4m3 [n, k/16], float32 scalar g   | e2m1 * e4m3 * g           |
| mxfp4     | e2m1, two a byte        | e8m0 [n, k/32]                     | e2m1 * 2^(byte - 127)     |
| fp8_block | e4m3                    | e8m0 or float32 [n/128, k/128]     | e4m3 * scale              |
| dense     | bfloat16 or float32     | none                               | as stored                 |

The low nibble of a byte is the even k. e2m1 * e4m3 is exact in bfloat16 and float16; the global
scale `g` is not a power of two and belongs in the epilogue.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints between neighbours; a tie goes to the even code.
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
FP8_BLOCK = 128
# Elements quantised at a time: intermediate values stay in cache, and below torch's threshold for
# threads, which here wait for each other longer than they work.
_QUANTIZE_BLOCK = 1 << 14


# ------------------------------------------------------------------------------ e2m1 and e8m0


_E2M1 = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])  # [16] by code
_E2M1_PAIRS = torch.stack((_E2M1[torch.arange(256) & 0xF], _E2M1[torch.arange(256) >> 4]), dim=-1)
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # [256] by code


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table [256, w] float32 (w 1 or 2), codes [n, m] bytes -> [n, m*w] float32, in new memory."""
    n, m = codes.shape
    if codes.is_cpu:  # numpy takes a third of the time of torch's index_select
        row = np.uint32 if table.shape[1] == 1 else np.uint64  # a table row as one number
        found = table.numpy().view(row).reshape(-1).take(codes.numpy())
        return torch.from_numpy(found.view(np.float32))
    return table.to(codes.device).index_select(0, codes.reshape(-1).int()).view(n, -1)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[n, k/2] bytes (uint8, int8 or float4_e2m1fn_x2) -> [n, k] float32 values of the codes."""
    return _look_up(_E2M1_PAIRS, packed.view(torch.uint8))


def e4m3_to_float(values: Tensor) -> Tensor:
    """[n, k] float8_e4m3fn -> float32, exactly; codes 0x7F and 0xFF are NaN."""
    return _look_up(_E4M3[:, None], values.view(torch.uint8))


def pack_e2m1(values: Tensor) -> Tensor:
    """[n, k] floats -> [n, k/2] uint8, each rounded to the nearest e2m1, ties to the even code."""
    magnitude = values.abs().float()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for lower, midpoint in enumerate(_E2M1_MIDPOINTS):  # codes below and above it: lower, lower + 1
        code += magnitude > midpoint if lower % 2 == 0 else magnitude >= midpoint
    code |= torch.signbit(values).to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4)


def e8m0_to_float(scale: Tensor) -> Tensor:
    """Bytes or float8_e8m0fnu -> float32 2^(byte - 127); byte 255 is NaN."""
    exponent = scale.view(torch.uint8).float() - 127.0
    value = torch.exp2(exponent)
    return torch.where(exponent == 128.0, torch.full_like(value, torch.nan), value)


def float_to_e8m0(scale: Tensor) -> Tensor:
    """Powers of two (float32) -> float8_e8m0fnu."""
    exponent = torch.log2(scale.double()).round().clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


# ------------------------------------------------------------------------------ quantisers


def quantize_nvfp4(weight: Tensor, amax: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ModelOpt's two-level quantisation of [n, k] (k a multiple of 16).

    Returns packed uint8 [n, k/2], block scales e4m3 [n, k/16] and the float32 scalar global scale
    amax/2688, a multiplier. `amax` sets the global scale (to share it between gate and up).
    """
    peak = float(weight.abs().max()) if amax is None else amax
    global_scale = torch.tensor(peak / (E2M1_MAX * E4M3_MAX) if peak > 0 else 1.0)
    rows = max(1, _QUANTIZE_BLOCK // weight.shape[1])
    parts = [_quantize_nvfp4_rows(part, global_scale) for part in weight.split(rows)]
    packed = torch.cat([codes for codes, _ in parts])
    scale = torch.cat([scales.view(torch.uint8) for _, scales in parts])
    return packed, scale.view(torch.float8_e4m3fn), global_scale


def _quantize_nvfp4_rows(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    blocks = weight.float().reshape(n, k // NVFP4_BLOCK, NVFP4_BLOCK)
    scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = scale.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = blocks / (scale.float() * global_scale)[..., None]  # divide by the rounded scale
    return pack_e2m1(codes.reshape(n, k)), scale


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] (k a multiple of 32) -> packed int8 [n, k/2], e8m0 scales [n, k/32]."""
    n, k = weight.shape
    blocks = weight.float().reshape(n, k // MXFP4_BLOCK, MXFP4_BLOCK)
    amax = blocks.abs().amax(-1).clamp(min=2.0**-120)
    scale = torch.exp2(torch.ceil(torch.log2(amax / E2M1_MAX)))
    codes = pack_e2m1((blocks / scale[..., None]).reshape(n, k))
    return codes.view(torch.int8), float_to_e8m0(scale)


def quantize_fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> e4m3 [n, k], e8m0 scales [ceil(n/128), ceil(k/128)]."""
    n, k = weight.shape
    rows, cols = -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)
    padded = torch.zeros(rows * FP8_BLOCK, cols * FP8_BLOCK)
    padded[:n, :k] = weight.float()
    amax = padded.view(rows, FP8_BLOCK, cols, FP8_BLOCK).abs().amax((1, 3)).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / E4M3_MAX)))
    full = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[:n, :k]
    return (weight.float() / full).to(torch.float8_e4m3fn), float_to_e8m0(scale)


# ------------------------------------------------------------------------------ one weight matrix


@dataclass
class Weight:
    """One [n, k] matrix as stored, whatever its format; tensors may be memory-mapped.

    `data`: nvfp4/mxfp4 uint8 [n, k/2]; fp8_block e4m3 [n, k]; dense bf16/f32 [n, k].
    `scale`: nvfp4 e4m3 [n, k/16]; mxfp4 e8m0 [n, k/32]; fp8_block float32 or e8m0; dense None.
    `global_scale`: nvfp4's multiplier, 1.0 elsewhere. `input_scale` is kept for W4A4 kernels.
    """

    name: str
    format: str
    data: Tensor
    scale: Tensor | None = None
    global_scale: float = 1.0
    input_scale: float | None = None
    _dense: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.data.shape
        return n, k * 2 if self.format in ("nvfp4", "mxfp4") else k

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device) -> Weight:
        scale = None if self.scale is None else self.scale.to(device)
        return Weight(
            self.name,
            self.format,
            self.data.to(device),
            scale,
            self.global_scale,
            self.input_scale,
        )

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32 [stop - start, k], every factor applied in float32."""
        data = self.data[start:stop]
        if self.format == "dense":
            return data.float()
        assert self.scale is not None, self.name
        if self.format == "fp8_block":
            return _apply_block_scales(e4m3_to_float(data), self.scale, start)
        block = NVFP4_BLOCK if self.format == "nvfp4" else MXFP4_BLOCK
        scale = self.scale[start:stop]
        factors = scale.float() if self.format == "nvfp4" else e8m0_to_float(scale)
        values = unpack_e2m1(data)
        values.view(*factors.shape, block).mul_(factors[..., None])
        return values.mul_(self.global_scale) if self.format == "nvfp4" else values

    def dequantize(self) -> Tensor:
        """The whole matrix, float32 [n, k]."""
        return self.dequantize_rows(0, self.shape[0])


def _apply_block_scales(values: Tensor, scale: Tensor, start: int) -> Tensor:
    """Multiply values [m, k] float32, rows from `start` of the matrix, by their 128x128 scales."""
    factors = scale if scale.dtype == torch.float32 else e8m0_to_float(scale)
    rows, k = values.shape
    if start % FP8_BLOCK == rows % FP8_BLOCK == k % FP8_BLOCK == 0:
        mine = factors[start // FP8_BLOCK : (start + rows) // FP8_BLOCK, None, :, None]
        blocks = values.view(rows // FP8_BLOCK, FP8_BLOCK, k // FP8_BLOCK, FP8_BLOCK)
        return blocks.mul_(mine).view(rows, k)
    factors = factors.repeat_interleave(FP8_BLOCK, 1)[:, :k]  # [row blocks, k]
    for block in range(start // FP8_BLOCK, -(-(start + rows) // FP8_BLOCK)):
        first = max(block * FP8_BLOCK, start)  # ragged: one row of blocks at a time
        values[first - start : (block + 1) * FP8_BLOCK - start].mul_(factors[block])
    return values


class DenseCache:
    """Keeps the most recently used dequantised matrices, so that the reference does not redo them.

    Only the reference uses it; `limit` bytes in all, least recently used out first. A matrix
    larger than a quarter of the limit is never kept.
    """

    def __init__(self, limit: int = 512 << 20) -> None:
        self.limit = limit
        self.used = 0
        self._entries: OrderedDict[int, Weight] = OrderedDict()

    def get(self, weight: Weight) -> Tensor | None:
        """The float32 matrix of `weight`, dequantised now if it may be kept, else None."""
        if weight._dense is not None:
            self._entries.move_to_end(id(weight))
            return weight._dense
        n, k = weight.shape
        size = 4 * n * k
        if size > self.limit // 4:
            return None
        weight._dense = weight.dequantize()
        self._entries[id(weight)] = weight  # holds a reference, so the id stays unique
        self.used += size
        while self.used > self.limit:
            _, old = self._entries.popitem(last=False)
            assert old._dense is not None
            self.used -= old._dense.nbytes
            old._dense = None
        return weight._dense

    def clear(self) -> None:
        for weight in self._entries.values():
            weight._dense = None
        self._entries.clear()
        self.used = 0


DENSE_CACHE = DenseCache()


# ------------------------------------------------------------------------------ scale swizzle


def swizzle_scales(scale: Tensor) -> Tensor:
    """[r, c] one-byte scales -> the flat 128x4 tiled order of cuBLAS and CUTLASS ("32_4_4").

    Rows are padded to 128 and columns to 4 with zeros. Byte of (r, c):
    512*((r//128)*ceil(C/4) + c//4) + 16*(r%32) + 4*((r%128)//32) + c%4.
    """
    raw = scale.view(torch.uint8)
    rows, cols = raw.shape
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    padded = raw.new_zeros(row_tiles * 128, col_tiles * 4)
    padded[:rows, :cols] = raw
    tiles = padded.view(row_tiles, 4, 32, col_tiles, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def unswizzle_scales(flat: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `swizzle_scales`: flat bytes -> [rows, cols]."""
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    tiles = flat.view(torch.uint8).view(row_tiles, col_tiles, 32, 4, 4)
    full = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * 128, col_tiles * 4)
    return full[:rows, :cols].contiguous().view(flat.dtype)
