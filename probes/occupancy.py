"""How full the caches are: the window, the compressed entries, the compressor's open window"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most


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
        self._used: dict[int | None, tuple[int, int]] = {}  # layer -> forward, entries

    def wants(self, site: Site) -> bool:
        return site.op in ("compressor", "attention")

    def observe(self, call: Call) -> Iterable[Reading]:
        if call.site.op == "attention":
            call.ask("empty", "window_index")
            return ()
        call.ask("empty", "score_state")
        if call.inputs["step"].padded:
            call.ask("values", "step.positions")
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        return self._compressor(call) if call.site.op == "compressor" else self._attention(call)

    def _compressor(self, call: Call) -> Iterable[Reading]:
        ratio, lengths = len(call.inputs["ape"]), _lengths(call)
        used, tail = [n // ratio for n in lengths], [n % ratio for n in lengths]
        if "/index/" not in call.site.path:
            self._used[call.site.layer] = (call.forward, sum(used))
        yield call.reading(self.name, "entries_used", used, "entries")
        yield call.reading(self.name, "tail", tail, "tokens")
        width = call.outputs["score_state"].shape[-1]
        wrong = sum(
            (empty < width) != (slot < waiting)  # an empty slot is all -inf
            for slots, waiting in zip(call.empty("score_state"), tail, strict=True)
            for slot, empty in enumerate(slots[-ratio:])
        )
        yield call.reading(self.name, "tail_error", wrong, "slots", 0, at_most(0))

    def _attention(self, call: Call) -> Iterable[Reading]:
        width, entries = call.inputs["window_index"].shape[1], call.inputs.get("entries")
        fill = (width - min(call.empty("window_index"))) / width
        yield call.reading(self.name, "window_fill", fill, "share")
        forward, used = self._used.get(call.site.layer, (-1, 0))
        if entries is not None and len(entries) and forward == call.forward:
            text = f"{used} of {len(entries)} rows"
            yield call.reading(self.name, "pool_fill", used / len(entries), "share", detail=text)


def _lengths(call: Call) -> list[int]:
    """Tokens of each sequence after the step."""
    step: Step = call.inputs["step"]
    if step.padded:  # one token of each, at positions that the device alone knows
        return [position + 1 for position in call.values("step.positions")]
    return [a + b for a, b in zip(step.starts, step.lengths, strict=True)]
