"""How full the caches are: the window, the compressed entries, the compressor's open window"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most
from dsv4_bench.probes.sampling import on_device


@probe
class CacheProbe(Probe):
    """Occupancy of one layer's caches after a step.

    `window_fill`: keys of the fullest window over its width. `entries_used`: compressed entries of
    each sequence; `pool_fill`: their share of the rows that are reserved. `tail`: tokens of each
    sequence that wait in the compressor; `tail_error`: slots of its open window that are filled and
    should not be, or the other way round.
    """

    name = "cache"
    help = "window fill, compressed entries used, tokens waiting in the compressor"
    reads = ("window_fill", "entries_used", "pool_fill", "tail", "tail_error")
    captures = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._used: dict[int | None, tuple[int, Tensor]] = {}  # layer -> forward, entries

    def wants(self, site: Site) -> bool:
        return site.op in ("compressor", "attention")

    def observe(self, call: Call) -> Iterable[Reading]:
        return self._compressor(call) if call.site.op == "compressor" else self._attention(call)

    def _compressor(self, call: Call) -> Iterable[Reading]:
        ratio = len(call.inputs["ape"])
        lengths = _lengths(call.inputs["step"], call.outputs["score_state"].device)
        used, tail = lengths // ratio, lengths % ratio
        if "/index/" not in call.site.path:
            self._used[call.site.layer] = (call.forward, used.sum())
        yield call.reading(self.name, "entries_used", used, "entries")
        yield call.reading(self.name, "tail", tail, "tokens")
        waiting = torch.arange(ratio, device=tail.device) < tail[:, None]
        wrong = _occupied(call.outputs["score_state"], ratio) != waiting
        yield call.reading(self.name, "tail_error", wrong.sum(), "slots", 0, at_most(0))

    def _attention(self, call: Call) -> Iterable[Reading]:
        index, entries = call.inputs["window_index"], call.inputs.get("entries")
        fill = (index >= 0).sum(-1).max() / index.shape[1]
        yield call.reading(self.name, "window_fill", fill, "share")
        forward, used = self._used.get(call.site.layer, (-1, None))
        if entries is not None and len(entries) and used is not None and forward == call.forward:
            text = f"of {len(entries)} rows"
            yield call.reading(self.name, "pool_fill", used / len(entries), "share", detail=text)


def _lengths(step: Step, device: torch.device) -> Tensor:
    """[b] int64: tokens of each sequence after the step."""
    if step.padded:  # one token of each, at positions that the device alone knows
        return step.positions + 1
    lengths = [a + b for a, b in zip(step.starts, step.lengths, strict=True)]
    return on_device(lengths, device)


def _occupied(score_state: Tensor, ratio: int) -> Tensor:
    """[b, ratio]: slots of the open window that hold a token; an empty one is all -inf."""
    return (score_state[:, -ratio:] != -torch.inf).any(-1)
