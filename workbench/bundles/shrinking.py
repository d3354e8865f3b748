"""`replay --minimise`: the smallest inputs on which a captured op is still wrong

Tokens (rows), heads and experts are taken away in halves, then one at a time, as long as the op stays
over its limit with the same kind of wrong. Every attempt runs the reference, the float64 oracle and
the implementation again, so the result is judged exactly as the original was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.registry import Function, Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.bundle import BundleCall, CallEntry, Writer, judge
from dsv4_bench.probes.bundle.record import describe_wrong
from dsv4_bench.probes.bundle.values import ExpertSubset
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import ROWWISE
from dsv4_bench.workbench.bundles.replaying import Replayer, ReplayReport

Arguments = dict[str, Any]

# Arguments whose first axis is the token, by op; only ops whose tokens do not depend on each other.
_ROWS: dict[str, tuple[str, ...]] = {
    **ROWWISE,
    "cache_write": ("rows", "slots"),
    "gather_swa": ("kv",),
}
# (argument, axis) of the head axis.
_HEADS: dict[str, tuple[tuple[str, int], ...]] = {
    "attention": (("q", 1), ("sink", 0)),
    "index_score": (("q", 1), ("weights", 1)),
    "rope": (("x", 1),),
    "rms_norm": (("x", 1),),
}


@dataclass
class Shrunk:
    """A smaller call with the same verdict, and what was taken away: ``rows 237 -> 1``."""

    call: BundleCall
    sizes: dict[str, tuple[int, int]]
    bytes: tuple[int, int]
    runs: int

    @property
    def sentence(self) -> str:
        parts = [f"{name} {before} -> {after}" for name, (before, after) in self.sizes.items()]
        before, after = self.bytes
        kind = (self.call.signature or {}).get("kind", "")
        tail = f"{before} -> {after} bytes of inputs, {self.runs} runs; still {kind}"
        return f"{', '.join(parts) or 'nothing to take away'}; {tail}"

    def to_dict(self) -> dict[str, Any]:
        sizes = {name: list(pair) for name, pair in self.sizes.items()}
        return {
            "site": self.call.site,
            "forward": self.call.forward,
            "sizes": sizes,
            "bytes": list(self.bytes),
            "runs": self.runs,
            "kind": (self.call.signature or {}).get("kind"),
            "sentence": self.sentence,
        }


def minimise(
    replayer: Replayer,
    entries: Sequence[CallEntry],
    report: ReplayReport,
    target: Path | None,
    narrate: Callable[[str], None],
) -> dict[str, Any]:
    """Shrink every op of `report` that is over its limit here; write them to `target` if given.

    Raises CannotAnswer if there is none: without something wrong everything could be taken away.
    """
    wrong = [e for e, op in zip(entries, report.ops, strict=True) if op.verdict == "over"]
    if not wrong:
        raise CannotAnswer(
            "nothing is over its limit here, so there is nothing to keep while shrinking",
            "--plugin and --route bring the implementation that was wrong",
        )
    shrunk = []
    for entry in wrong:
        chosen, _ = replayer.implementation(entry)
        assert chosen is not None
        call = replayer.bundle.load(entry, replayer.device)
        shrunk.append(shrink(call, chosen.function))
        narrate(f"minimised {entry.label}: {shrunk[-1].sentence}")
    document: dict[str, Any] = {"ops": [item.to_dict() for item in shrunk], "bundle": None}
    if target is not None:
        document["bundle"] = str(target)
        document["bytes"] = _write(replayer, shrunk, target)
    return document


@torch.inference_mode()
def shrink(call: BundleCall, function: Function) -> Shrunk:
    """The smallest call found on which `function` stays wrong in the same way."""
    state = _State(call, function)
    state.attempt(_with_used_experts(state.best.captured))
    whole = _input_bytes(state.best.captured)
    sizes = {}
    for name, cut in (("experts", _cut_experts), ("rows", _cut_rows), ("heads", _cut_heads)):
        before = _size(name, state.best.captured)
        if before:
            state.reduce(before, cut)
            after = _size(name, state.best.captured)
            if after < before:
                sizes[name] = (before, after)
    used = _compact_pools(state)
    if used:
        sizes["pool rows"] = used
    return Shrunk(state.best, sizes, (whole, _input_bytes(state.best.captured)), state.runs)


class _State:
    """The best call so far. `attempt` judges a smaller one, and keeps it if it is as wrong."""

    def __init__(self, call: BundleCall, function: Function) -> None:
        self.function = function
        self.bounds = {n: (c.limit, c.limit_row) for n, c in call.checks.items()}
        self.runs = 0
        judged = self._judged(call.captured, call)
        if judged is None or judged.verdict != "over":
            raise DSV4Error(f"{call.site} is not wrong here", "nothing to minimise")
        self.best = judged
        self.kind = (judged.signature or {}).get("kind")

    def attempt(self, captured: Captured | None) -> bool:
        judged = None if captured is None else self._judged(captured, self.best)
        if judged is None or judged.verdict != "over":
            return False
        if (judged.signature or {}).get("kind") != self.kind:
            return False
        self.best = judged
        return True

    def _judged(self, captured: Captured, like: BundleCall) -> BundleCall | None:
        """The call with outputs of the implementation; None if something cannot run on it."""
        self.runs += 1
        try:
            reference = captured.run(captured.site.spec.reference)
            truth = captured.oracle()
            outputs = captured.run(self.function)
            checks = judge(captured, outputs, reference, truth, self._bounds_of(truth))
        except Exception:  # too small for somebody's kernel: not smaller, then
            return None
        ran = Captured(captured.site, captured.args, captured.before, outputs)
        signature = describe_wrong(ran, truth, checks)
        return BundleCall(ran, like.forward, reference, checks, like.stamp, signature)

    def _bounds_of(self, truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """The limits for as many rows as are left: less averages out, and one row is its worst."""
        return {
            name: (limit + max(row - limit, 0.0) / max(len(truth[name]), 1) ** 0.5, row)
            for name, (limit, row) in self.bounds.items()
        }

    def reduce(self, count: int, cut: Callable[[Captured, list[int]], Captured | None]) -> None:
        """Delta debugging over items 0 ... count - 1: drop ever smaller pieces while it stays wrong."""
        keep = list(range(count))
        whole = self.best.captured
        pieces = 2
        while len(keep) > 1 and pieces <= 2 * len(keep):
            size = -(-len(keep) // pieces)
            for first in range(0, len(keep), size):
                rest = keep[:first] + keep[first + size :]
                if rest and self.attempt(cut(whole, rest)):
                    keep, pieces = rest, max(2, pieces - 1)
                    break
            else:
                if size == 1:
                    return
                pieces *= 2


# ------------------------------------------------------------------------------ what can be cut


def _size(name: str, captured: Captured) -> int:
    """How many rows, heads or experts a call has; 0 where they cannot be taken away."""
    op, inputs = captured.site.op, captured.inputs
    if name == "rows" and op in _ROWS:
        return len(inputs[_ROWS[op][0]])
    if name == "heads" and op in _HEADS:
        argument, axis = _HEADS[op][0]
        return int(inputs[argument].shape[axis]) if inputs[argument].dim() == 3 else 0
    if name == "experts" and op == "experts":
        return len(inputs["bank"].experts)
    return 0


def _cut_rows(captured: Captured, keep: list[int]) -> Captured:
    inputs = captured.inputs
    cut = {}
    for name in _ROWS[captured.site.op]:
        if inputs[name] is not None:
            cut[name] = inputs[name][_index(keep, inputs[name])]
    return _with(captured, cut)


def _cut_heads(captured: Captured, keep: list[int]) -> Captured:
    inputs = captured.inputs
    cut = {
        name: inputs[name].index_select(axis, torch.tensor(keep, device=inputs[name].device))
        for name, axis in _HEADS[captured.site.op]
    }
    return _with(captured, cut)


def _cut_experts(captured: Captured, keep: list[int]) -> Captured | None:
    """Only tokens all of whose experts are kept stay; the ids stay, so that kernels see what they saw."""
    inputs = captured.inputs
    bank: ExpertSubset = inputs["bank"]
    numbers = sorted(bank.experts)
    kept = {numbers[i]: bank.experts[numbers[i]] for i in keep}
    allowed = torch.tensor(sorted(kept), device=inputs["experts"].device)
    rows = torch.isin(inputs["experts"], allowed).all(1).nonzero().flatten().tolist()
    if not rows:
        return None
    return _with(_cut_rows(captured, rows), {"bank": ExpertSubset(len(bank), kept)})


def _index(keep: list[int], tensor: Tensor) -> slice | Tensor:
    """A slice where the rows follow each other, which keeps strides and padding; else an index."""
    if keep == list(range(keep[0], keep[-1] + 1)):
        return slice(keep[0], keep[-1] + 1)
    return torch.tensor(keep, device=tensor.device)


def _with(captured: Captured, changed: Arguments) -> Captured:
    """The call with other arguments; constants may be among them."""
    site, spec = captured.site, captured.site.spec
    params = {name: changed.get(name, value) for name, value in site.params.items()}
    inputs = {**captured.inputs, **changed}
    args = tuple(inputs[name] for name in spec.parameters[: len(captured.args)])
    smaller = Site(site.path, spec, params, site.layer)
    return Captured(smaller, args, {name: inputs[name] for name in captured.before})


def _with_used_experts(captured: Captured) -> Captured:
    """The call with a bank of only those experts that it uses, as a bundle has it."""
    if captured.site.op != "experts":
        return captured
    bank, used = captured.inputs["bank"], sorted(set(captured.inputs["experts"].flatten().tolist()))
    return _with(captured, {"bank": ExpertSubset(len(bank), {e: bank[e] for e in used})})


def _compact_pools(state: _State) -> tuple[int, int] | None:
    """Cut the rows of attention's pools behind the last one that is used; (before, after)."""
    captured = state.best.captured
    if captured.site.op != "attention":
        return None
    inputs, changed = captured.inputs, {}
    before = after = 0
    for pool, index in (("window", "window_index"), ("entries", "entry_index")):
        if inputs[pool] is None:
            continue
        last = int(inputs[index].max()) + 1 if inputs[index].numel() else 0
        changed[pool] = inputs[pool][: max(1, last)]
        before, after = before + len(inputs[pool]), after + len(changed[pool])
    return (before, after) if after < before and state.attempt(_with(captured, changed)) else None


def _input_bytes(captured: Captured) -> int:
    """Bytes of the values of all arguments, weights and the experts included."""
    return sum(_bytes(value) for value in captured.inputs.values())


def _bytes(value: Any) -> int:
    if isinstance(value, ExpertSubset):
        return sum(expert.nbytes for expert in value.experts.values())
    if isinstance(value, Step):
        return value.tokens.nbytes
    return int(getattr(value, "nbytes", 0))


# ------------------------------------------------------------------------------ the smaller bundle


def _write(replayer: Replayer, shrunk: Iterable[Shrunk], target: Path) -> int:
    """A bundle of the smaller calls, with the old one's manifest."""
    from dsv4_bench.probes.bundle.standalone_script import standalone_script

    old = replayer.bundle.manifest
    with Writer(target) as writer:
        kept = list(_one_a_site(shrunk))
        for item in kept:
            writer.add_call(item.call)
        writer.add_file("replay.py", standalone_script().encode())
        counts = dict.fromkeys(("captured", "calls", "over"), len(kept))
        coverage = {**old["coverage"], **counts}
        minimised = [item.to_dict() for item in kept]
        return writer.publish({**old, "coverage": coverage, "minimised": minimised})


def _one_a_site(shrunk: Iterable[Shrunk]) -> Iterator[Shrunk]:
    """The smallest call of each site: constants are stored once a site, and were cut for one call."""
    best: dict[str, Shrunk] = {}
    for item in shrunk:
        other = best.get(item.call.site)
        if other is None or item.bytes[1] < other.bytes[1]:
            best[item.call.site] = item
    yield from best.values()
