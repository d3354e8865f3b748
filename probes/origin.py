"""Where a NaN or infinity is made: the first site with finite inputs, the smallest slice, what fed it"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import WRITTEN_ROWS, Call, Reading, Request
from dsv4_bench.probes.stats import Stats, first_nonfinite

_LISTED = 4  # indices of an axis that are named one by one


@probe
class NonFiniteProbe(Probe):
    """Sites that make a NaN or Inf of finite inputs: where it is born, not where it spreads.

    `first_nonfinite` is its coordinate in row-major order; `nonfinite_slice` the bounds [start, stop)
    of every axis around all of them. Infinities that an op declares are none. Of a pool of keys only
    the rows count as input that the call refers to: what comes from the others was read by mistake.
    """

    name = "nonfinite"
    help = "sites that make a NaN or Inf of finite inputs: where, how much, and what fed it"
    reads = ("first_nonfinite", "nonfinite_slice")
    captures = True

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output in call.outputs:
            call.ask("stats", output)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        for output, tensor in call.outputs.items():
            stats = call.stats(output)
            if stats is None or not _undeclared(call.site, output, stats):
                continue
            bad = ~torch.isfinite(_without_declared(call.site, output, tensor))
            bad &= _rows_looked_at(call, output)
            where = first_nonfinite(torch.where(bad, torch.nan, 0.0))
            if where is None or _spread(call):
                continue
            value = float(tensor[tuple(where)])
            axes = [
                bad.any(dim=_all_but(bad.ndim, axis)).nonzero().flatten()
                for axis in range(bad.ndim)
            ]
            bounds = [float(b) for index in axes for b in (int(index[0]), int(index[-1]) + 1)]
            size = " x ".join(
                _axis_text(index, n) for index, n in zip(axes, bad.shape, strict=True)
            )
            made = f"{output}{where} is {value}, inputs finite: {_cause(call, axes, len(bad))}"
            yield call.reading(
                self.name, "first_nonfinite", [float(i) for i in where], "index", None, "alarm", made, output
            )  # fmt: skip
            text = f"{int(bad.sum())} of {bad.numel()} values of {output}, in {size}"
            yield call.reading(
                self.name, "nonfinite_slice", bounds, "bounds", None, "alarm", text, output
            )
            return


def _rows_looked_at(call: Call, output: str) -> Tensor:
    """[rows, 1, ...]: whether a row of an output is one that the call has written; [] for all."""
    tensor, index = call.looked_at(Request("stats", output))
    if index is None:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    rows = torch.zeros(len(tensor), dtype=torch.bool, device=tensor.device)
    rows[index[index >= 0].long()] = True
    return rows.view(-1, *[1] * (tensor.ndim - 1))


def _all_but(count: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(count) if i != axis)


def _axis_text(index: Tensor, size: int) -> str:
    """The indices of one axis that are hit: ``3``, ``0:16``, ``3, 17, 40`` or a count."""
    found = index.tolist()
    first, last = found[0], found[-1]
    if len(found) == size:
        return f"all {size}"
    if last - first + 1 == len(found):
        return f"{first}:{last + 1}" if len(found) > 1 else str(first)
    if len(found) <= _LISTED:
        return ", ".join(map(str, found))
    return f"{len(found)} of {first}:{last + 1}"


def _undeclared(site: Site, output: str, stats: Stats) -> int:
    """NaN and infinities that the op does not declare."""
    count: int = stats.nan + stats.inf - (stats.minus_inf if output in site.spec.nonfinite else 0)
    return count


def _without_declared(site: Site, name: str, tensor: Tensor) -> Tensor:
    """`tensor` with the infinities that the op declares taken out."""
    return torch.where(tensor == -torch.inf, 0.0, tensor) if name in site.spec.nonfinite else tensor


# ------------------------------------------------------------------------------ what fed it


def run_time_inputs(call: Call) -> Iterator[tuple[str, Tensor]]:
    """Floating-point arguments of this call as they were before the op, without the constants."""
    only_written = WRITTEN_ROWS.get(call.site.op, ("", ""))[0]
    for name, value in call.inputs.items():
        if name == only_written:
            continue
        if name not in call.site.params and isinstance(value, Tensor) and value.is_floating_point():
            yield name, call.before.get(name, value)


def rows_in_use(call: Call, name: str, tensor: Tensor) -> Tensor:
    """The part of an input that the op has to read: of a pool, the rows that an index refers to."""
    index = call.inputs.get({"window": "window_index", "entries": "entry_index"}.get(name, ""))
    if call.site.op == "attention" and isinstance(index, Tensor):
        return tensor[index[index >= 0].unique().long()]
    if call.site.op == "index_score" and name == "keys":
        step, ratio = call.inputs["step"], call.inputs["ratio"]
        counts = [step.entries_of(b, ratio) for b in range(len(tensor))]
        return torch.cat([tensor[b, :count] for b, count in enumerate(counts)])
    return tensor


def _finite(site: Site, name: str, tensor: Tensor) -> bool:
    return bool(torch.isfinite(_without_declared(site, name, tensor)).all())


def _spread(call: Call) -> bool:
    """Whether an input was not finite already."""
    inputs = run_time_inputs(call)
    return not all(_finite(call.site, name, rows_in_use(call, name, t)) for name, t in inputs)


def _cause(call: Call, axes: list[Tensor], rows: int) -> str:
    """What can be said of the inputs: a bad constant, rows nobody asked for, or how large they are.

    `axes` are the indices hit on each axis of the output, which has `rows` rows.
    """
    for name, value in _constants(call):
        found = first_nonfinite(value.float())
        if found is not None:
            return f"{name}{found} is {float(value[tuple(found)])}"
    for name, tensor in run_time_inputs(call):
        found = first_nonfinite(_without_declared(call.site, name, tensor))
        if found is not None:
            return f"{name}{found} is {float(tensor[tuple(found)])}, in a row the call does not refer to"
    parts = []
    for name, tensor in run_time_inputs(call):
        same_rows = tensor.ndim > 0 and len(tensor) == rows
        fed = tensor[axes[0]] if same_rows else rows_in_use(call, name, tensor)
        if fed.numel():
            largest = float(_without_declared(call.site, name, fed).abs().max())
            which = f"rows {_axis_text(axes[0], rows)} of {name}" if same_rows else name
            parts.append(f"{which} up to {largest:.3g}")
    return ", ".join(parts) or "no floating-point input"


def _constants(call: Call) -> Iterator[tuple[str, Tensor]]:
    """The op's constant tensors by name: parameters, and what weights are stored as."""
    for name, value in call.site.params.items():
        if name == "bank":
            used = sorted(set(call.inputs["experts"].flatten().tolist()))
            for expert in (e for e in used if 0 <= e < len(value)):
                yield from _stored(f"bank[{expert}]", value[expert])
        else:
            yield from _stored(name, value)


def _stored(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Expert):
        for leaf, weight in value._asdict().items():
            yield from _stored(f"{name}.{leaf}", weight)
    elif isinstance(value, Weight):
        yield f"{name}.global_scale", torch.tensor([value.global_scale])
        if value.scale is not None:
            yield f"{name}.scale", value.scale
        if value.format in ("dense", "fp8_block"):
            yield f"{name}.data", value.data
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
