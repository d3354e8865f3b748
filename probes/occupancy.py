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

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._used: dict[int | None, tuple[int, int]] = {}  # layer -> forward, entries

    def wants(self, site: Site) -> bool:
        return site.op in ("compressor", "attention")

    def observe(self, call: Call) -> Iterable[Reading]:
        return self._compressor(call) if call.site.op == "compressor" else self._attention(call)

    def _compressor(self, call: Call) -> Iterable[Reading]:
        step: Step = call.inputs["step"]
        ratio = len(call.inputs["ape"])
        lengths = [a + b for a, b in zip(step.starts, step.lengths, strict=True)]
        used, tail = [n // ratio for n in lengths], [n % ratio for n in lengths]
        if "/index/" not in call.site.path:
            self._used[call.site.layer] = (call.forward, sum(used))
        yield call.reading(self.name, "entries_used", [float(n) for n in used], "entries")
        yield call.reading(self.name, "tail", [float(n) for n in tail], "tokens")
        wrong = _occupied(call.outputs["score_state"], ratio) != _expected(tail, ratio, call)
        yield call.reading(self.name, "tail_error", wrong.sum(), "slots", 0, at_most(0))

    def _attention(self, call: Call) -> Iterable[Reading]:
        index, entries = call.inputs["window_index"], call.inputs.get("entries")
        fill = (index >= 0).sum(-1).max() / index.shape[1]
        yield call.reading(self.name, "window_fill", fill, "share")
        forward, used = self._used.get(call.site.layer, (-1, 0))
        if entries is not None and len(entries) and forward == call.forward:
            text = f"{used} of {len(entries)} rows"
            yield call.reading(self.name, "pool_fill", used / len(entries), "share", detail=text)


def _occupied(score_state: Tensor, ratio: int) -> Tensor:
    """[b, ratio]: slots of the open window that hold a token; an empty one is all -inf."""
    return (score_state[:, -ratio:] != -torch.inf).any(-1)


def _expected(tail: list[int], ratio: int, call: Call) -> Tensor:
    device = call.outputs["score_state"].device
    waiting = on_device(tail, device)[:, None]
    return torch.arange(ratio, device=device) < waiting
