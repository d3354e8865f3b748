"""Probes of any tensor: statistics, and the first value that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading


@dataclass(frozen=True)
class Stats:
    """Counts of values, and moments over the finite ones (0 when there are none)."""

    finite: int
    nan: int
    inf: int
    abs_max: float
    rms: float
    mean: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def tensor_stats(tensor: Tensor) -> Stats | None:
    """Statistics of a floating-point tensor of any shape; None for other dtypes."""
    if not tensor.is_floating_point():
        return None
    values = tensor.detach().float().flatten()
    finite = torch.isfinite(values)
    count = int(finite.sum())
    if count == values.numel():
        nan = inf = 0
    else:
        nan = int(torch.isnan(values).sum())
        inf = values.numel() - count - nan
        values = values[finite]
    if count == 0:
        return Stats(0, nan, inf, 0.0, 0.0, 0.0)
    rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / count**0.5
    return Stats(count, nan, inf, float(values.abs().max()), rms, float(values.mean()))


def first_nonfinite(tensor: Tensor) -> list[int] | None:
    """Coordinate of the first NaN or infinity in row-major order, or None."""
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return None
    flat = int(bad.flatten().to(torch.uint8).argmax())
    coordinate = []
    for size in reversed(tensor.shape):
        coordinate.append(flat % size)
        flat //= size
    return coordinate[::-1]


def expected_nonfinite(site: Site, output: str) -> bool:
    """Whether infinities are declared for this output (masks, the compressor's empty slots)."""
    return output in site.spec.nonfinite


@probe
class StatsProbe(Probe):
    """NaN and Inf counts, largest magnitude, rms and mean of every output."""

    name = "stats"
    help = "nan, inf, abs_max, rms, mean of every output"
    reads = ("nan", "inf", "abs_max", "rms", "mean")

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output, tensor in call.outputs.items():
            stats = tensor_stats(tensor)
            if stats is None:
                continue
            for count, name in ((stats.nan, "nan"), (stats.inf, "inf")):
                expected = name == "inf" and expected_nonfinite(call.site, output)
                if expected and count:
                    continue
                verdict = "alarm" if count else "ok"
                yield call.reading(self.name, name, count, "values", 0, verdict, output=output)
            yield call.reading(self.name, "abs_max", stats.abs_max, output=output)
            yield call.reading(self.name, "rms", stats.rms, output=output)
            yield call.reading(self.name, "mean", stats.mean, output=output)


@probe
class NonFiniteProbe(Probe):
    """The first site whose inputs are finite and whose output is not, with the coordinate."""

    name = "nonfinite"
    help = "first site that makes a NaN or Inf, with its first coordinate"
    reads = ("first_nonfinite",)

    def __init__(self) -> None:
        self.found: str | None = None

    def reset(self) -> None:
        self.found = None

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        if self.found not in (None, call.site.path):
            return
        for output, tensor in call.outputs.items():
            if not tensor.is_floating_point():
                continue
            if expected_nonfinite(call.site, output):
                tensor = torch.where(tensor == -torch.inf, 0.0, tensor)
            coordinate = first_nonfinite(tensor)
            if coordinate is None:
                continue
            self.found = call.site.path
            value = float(tensor[tuple(coordinate)])
            detail = f"{output}{coordinate} is {value}; inputs {_input_state(call)}"
            where = [float(i) for i in coordinate]
            yield call.reading(
                self.name, "first_nonfinite", where, "index", None, "alarm", detail, output
            )
            return


def _input_state(call: Call) -> str:
    bad = [
        name
        for name, value in call.inputs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and name not in call.site.spec.nonfinite
        and not bool(torch.isfinite(call.before.get(name, value)).all())
    ]
    return f"not finite: {', '.join(bad)}" if bad else "all finite"
