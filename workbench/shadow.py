"""The shadow of a session: every op on the other route too, and a reference run beside the whole

Own error is an op's error on the inputs it was given; carried error is how far its outputs are from
those of a run that was on the reference from the first token on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, Site, choose, matches
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.judge import Judge, Judgement
from dsv4_bench.probes.readings import Call
from dsv4_bench.workbench.carried import ReferenceRun

Timed = Callable[[Callable[[], Any]], tuple[float, Any]]


class Shadow:
    """What is compared, and with what; `pattern` is a site glob, empty for off.

    `timed(run)` gives (seconds, result) of a call; `between(forward, layer)` may raise to end a
    reference run that has to catch up.
    """

    def __init__(
        self,
        model: Transformer,
        spans: Sequence[tuple[int, int]],
        timed: Timed,
        between: Callable[[int, int], None],
    ) -> None:
        self.model = model
        self.timed = timed
        self.pattern = ""
        self.carried = False
        self.judge = Judge(model.dtype, model.config)
        self.reference = ReferenceRun(model, spans, between)

    def covers(self, path: str) -> bool:
        return bool(self.pattern) and matches(path, self.pattern)

    def other(self, site: Site) -> Implementation | None:
        """What an op is compared with: the reference, or if that runs, the best kernel."""
        name = "kernel" if site.stamp.implementation == "reference" else "reference"
        impl, _ = choose(site.op, name, self.model.context)
        return None if impl.name == site.stamp.implementation else impl

    def rerun(
        self, call: Call, args: tuple[Any, ...], other: Implementation
    ) -> tuple[float, dict[str, Tensor]]:
        """Seconds and outputs of `other` on the inputs of `call`, which are left as they are.

        Raises what `other` raises.
        """
        seconds = 0.0

        def timed(*args: Any, **params: Any) -> Any:
            nonlocal seconds
            seconds, result = self.timed(lambda: other.function(*args, **params))
            return result

        outputs = Captured(call.site, args, call.before).run(timed)
        return seconds, outputs

    def judged(
        self, call: Call, args: tuple[Any, ...], others: dict[str, Tensor], positions: Tensor
    ) -> Judgement | None:
        """The route's outputs in `call` against `others`, one of the two being the reference's.

        `positions` [n] are those of the tokens.
        """
        ours, theirs = call.outputs, others
        if call.site.stamp.implementation == "reference":
            ours, theirs = theirs, ours
        captured = Captured(call.site, args, call.before, theirs)
        return self.judge.judge(captured, ours, positions, call.forward)

    def cost(self) -> dict[str, Any]:
        """What calibrating has taken so far: ops with limits, runs in float64, seconds."""
        judge = self.judge
        return {
            "ops": len({op for op, _ in judge.limits.table}),
            "calls": judge.calls,
            "seconds": judge.seconds,
        }
