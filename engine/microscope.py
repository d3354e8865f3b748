"""The quantisation microscope: how well a matrix's blocks use their scales and codes

Everything is measured on the stored tensors. What rounding cost can be measured only with the
original matrix (`measured_noise`); without it, `examine` estimates: the original of a stored value
is taken as uniform over the interval that rounds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    Weight,
    e4m3_to_float,
    e8m0_to_float,
    pack_e2m1,
    unpack_e2m1,
)

E4M3_MIN_NORMAL = 2.0**-6
ROWS = 256  # rows of a matrix whose codes are read unless all are asked for
BLOCKS = 256  # blocks whose best scale is searched
_SLACK_CODE = 3.0  # a block that reaches no further could have half its scale
_POINTS = 8  # per interval, where its integral is taken
# Magnitudes that round to each e2m1 value, in units of the scale; a block's largest value is 6.
_INTERVALS = ((-0.25, 0.25), (0.25, 0.75), (0.75, 1.25), (1.25, 1.75), (1.75, 2.5), (2.5, 3.5),
              (3.5, 5.0), (5.0, 6.0))  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """What the microscope saw of one matrix. Shares are of what was looked at.

    `exponents`: floor(log2) of the block scales -> how many; zero scales are in `zero_scales`.
    `at_max`, `subnormal`: block scales of 448, or in (0, 2^-6); e4m3 scales only. `at_top`: elements
    at the format's largest magnitude. `zeros`: elements 0. `zero_blocks`: blocks of zeros alone under
    a scale that is not 0. `slack`: blocks whose largest code is at most 3, half of what it could be.
    `codes`: share of each e2m1 magnitude. `noise`: mean square rounding error over mean square value,
    as estimated for the stored scales; `best_noise` for the best scale of each block.
    """

    name: str
    format: str
    shape: tuple[int, int]
    scales: int
    exponents: dict[int, int]
    zero_scales: float
    at_max: float | None
    subnormal: float | None
    global_scale: float
    input_scale: float | None
    rows: int
    at_top: float
    zeros: float
    zero_blocks: float | None = None
    slack: float | None = None
    codes: tuple[float, ...] = ()
    noise: float | None = None
    best_noise: float | None = None
    filled: int = 0  # blocks of these rows that hold something
    searched: int = 0  # those that the two estimates are from

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "exponents": {str(e): n for e, n in self.exponents.items()}}

    @property
    def sampling(self) -> str:
        """What was not looked at, in words; empty if nothing."""
        parts = []
        if self.rows < self.shape[0]:
            parts.append(f"codes of {self.rows} of {self.shape[0]} rows")
        if self.searched < self.filled:
            parts.append(f"noise of {self.searched} of {self.filled} blocks")
        return ", ".join(parts)


def block_scales(weight: Weight) -> Tensor:
    """Block scales of a quantised weight as stored, in float32, same shape."""
    assert weight.scale is not None, weight.name
    if weight.format == "nvfp4" or weight.scale.dtype == torch.float32:
        return weight.scale.float()
    return e8m0_to_float(weight.scale)


def examine(weight: Weight, rows: int = ROWS, blocks: int = BLOCKS) -> Blocks:
    """Look at all scales of a quantised matrix, the codes of up to `rows` rows, evenly spaced, and the
    rounding of up to `blocks` of their blocks. Raises ValueError for a dense matrix.
    """
    if weight.scale is None:
        raise ValueError(f"{weight.name} is {weight.format}: it has no blocks")
    scales, shape = block_scales(weight), weight.shape
    e4m3 = weight.format == "nvfp4"
    positive = scales[(scales > 0) & torch.isfinite(scales)]
    powers, counts = torch.frexp(positive).exponent.unique(return_counts=True)
    chosen = _spaced(shape[0], rows)
    data = weight.data[chosen]
    common: dict[str, Any] = {
        "name": weight.name,
        "format": weight.format,
        "shape": shape,
        "scales": scales.numel(),
        "exponents": {int(p) - 1: int(c) for p, c in zip(powers, counts, strict=True)},
        "zero_scales": _share(scales == 0),
        "at_max": _share(scales >= E4M3_MAX) if e4m3 else None,
        "subnormal": _share((scales > 0) & (scales < E4M3_MIN_NORMAL)) if e4m3 else None,
        "global_scale": weight.global_scale,
        "input_scale": weight.input_scale,
        "rows": len(chosen),
    }
    if weight.format == "fp8_block":
        values = e4m3_to_float(data).abs()
        return Blocks(**common, at_top=_share(values >= E4M3_MAX), zeros=_share(values == 0))
    values = unpack_e2m1(data)
    block = NVFP4_BLOCK if e4m3 else MXFP4_BLOCK
    return Blocks(
        **common, **_codes(values.view(-1, block), scales[chosen].flatten(), e4m3, blocks)
    )


def _codes(values: Tensor, scales: Tensor, e4m3: bool, most: int) -> dict[str, Any]:
    """Of blocks of e2m1 values [m, block] with their scales [m]: shares, and estimated noise."""
    magnitude = values.abs()
    peak = magnitude.amax(-1)
    shares = tuple(_share(magnitude == value) for value in E2M1_VALUES)
    filled = ((peak > 0) & (scales > 0) & torch.isfinite(scales)).nonzero().flatten()
    useful = filled[_spaced(len(filled), most)]
    noise, best = (
        estimated_noise(values[useful], scales[useful], e4m3) if len(useful) else (None,) * 2
    )
    return {
        "at_top": shares[-1],
        "zeros": shares[0],
        "zero_blocks": _share((peak == 0) & (scales > 0)),
        "slack": _share((peak > 0) & (peak <= _SLACK_CODE)),
        "codes": shares,
        "noise": noise,
        "best_noise": best,
        "filled": len(filled),
        "searched": len(useful),
    }


def estimated_noise(values: Tensor, scales: Tensor, e4m3: bool) -> tuple[float, float]:
    """Estimated relative noise of blocks of e2m1 values [m, block]: with their scales [m], and with
    the best scale of each block that the format has.

    noise = sum (x - round(x))^2 / sum x^2 over originals x spread evenly over each code's interval.
    """
    edges = torch.tensor(_INTERVALS)  # [8, 2]
    steps = (torch.arange(_POINTS) + 0.5) / _POINTS
    points = edges[:, :1] + (edges[:, 1:] - edges[:, :1]) * steps  # [8, points]
    code = torch.bucketize(values.abs(), torch.tensor(E2M1_VALUES))
    originals = points[code] * scales[:, None, None]  # [m, block, points]; signs do not matter
    return block_noise(originals.flatten(1), scales, e4m3)


def block_noise(originals: Tensor, scales: Tensor, e4m3: bool) -> tuple[float, float]:
    """Relative noise of rounding blocks [m, b] to e2m1: with `scales` [m], with the best scales.

    The best is searched among the scales of the format between 1/2 and 3/2 of what takes the block's
    largest value to 6 (e8m0: the two powers of two around it, and the next smaller one).
    """
    errors = [_squared_error(originals, scales)]
    ideal = originals.abs().amax(-1) / E2M1_MAX
    for candidate in _candidates(ideal, e4m3):
        errors.append(_squared_error(originals, candidate))
    power = originals.double().square().sum()
    best = torch.stack(errors).amin(0)
    return float(errors[0].sum() / power), float(best.sum() / power)


def _candidates(ideal: Tensor, e4m3: bool) -> list[Tensor]:
    if not e4m3:
        power = torch.exp2(torch.floor(torch.log2(ideal.clamp(min=2.0**-120))))
        return [power / 2, power, power * 2]
    code = ideal.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).int()
    # Eight codes are a factor of two: -8 ... +5 covers 1/2 to 3/2 from any mantissa.
    around = [(code + step).clamp(1, 0x7E).to(torch.uint8) for step in range(-8, 6)]
    return [c.view(torch.float8_e4m3fn).float() for c in around]


def _squared_error(originals: Tensor, scales: Tensor) -> Tensor:
    """[m] float64: sum over each block of (x - scale * e2m1(x / scale))^2."""
    rounded = unpack_e2m1(pack_e2m1(originals / scales[:, None])) * scales[:, None]
    return (originals - rounded).double().square().sum(-1)


def measured_noise(weight: Weight, original: Weight, rows: int = ROWS) -> tuple[float, float]:
    """Relative noise of a 4-bit matrix against its original: as stored, and with the best block scales
    under the same global scale; of up to `rows` rows. Raises ValueError for other formats and shapes.
    """
    if weight.format not in ("nvfp4", "mxfp4") or original.shape != weight.shape:
        raise ValueError(f"{weight.name}: {weight.format} {weight.shape}, {original.shape}")
    chosen = _spaced(weight.shape[0], rows)
    e4m3 = weight.format == "nvfp4"
    block = NVFP4_BLOCK if e4m3 else MXFP4_BLOCK
    truth, stored = (
        torch.cat([w.dequantize_rows(row, row + 1) for row in chosen.tolist()])
        for w in (original, weight)
    )
    actual = float((stored - truth).double().square().sum() / truth.double().square().sum())
    scales = block_scales(weight)[chosen].flatten()
    _, best = block_noise((truth / weight.global_scale).reshape(-1, block), scales, e4m3)
    return actual, best


def gate_up(w1: Weight, w3: Weight) -> dict[str, float | None]:
    """Ratios of gate to up that a fused kernel has to keep apart: global scale, input scale."""
    inputs = w1.input_scale and w3.input_scale
    return {
        "global_ratio": w1.global_scale / w3.global_scale if w3.global_scale else None,
        "input_ratio": w1.input_scale / w3.input_scale if inputs else None,  # type: ignore[operator]
    }


def _spaced(count: int, most: int) -> Tensor:
    """Up to `most` of the indices below `count`, evenly spaced."""
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most).round().long()


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0
