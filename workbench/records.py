"""What a debugger knows of ops: of every site in the present forward pass, and of the op it stands at"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.compare import Comparison
from dsv4_bench.probes.readings import Call
from dsv4_bench.probes.signatures import Signature

# What an alarm is about, worst first: the op raised, its own error is over the limit, it has NaN or
# infinities, a probe saw a promise broken.
ANOMALIES = ("failed", "over", "nonfinite", "broken")


@dataclass
class Record:
    """What is known of a site in the present forward pass."""

    state: str = "pending"
    seconds: dict[str, float] = field(default_factory=dict)  # by implementation
    own_error: Comparison | None = None
    signature: Signature | None = None  # of an own error over its limit
    carried_error: float | None = None
    alarm: str = ""
    anomaly: str = ""  # the worst of ANOMALIES that was read here


@dataclass
class Held:
    """The op the session stands at."""

    call: Call
    args: tuple[Any, ...]
    result: Any = None
    others: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by implementation
    effect: str = ""
    resolved: bool = (
        False  # it had failed, and a route switch has run it while the session stood here
    )


def named_outputs(site: Site, result: Any) -> dict[str, Tensor]:
    """Outputs by name. Raises TypeError if there are not as many tensors as the contract says."""
    spec = site.spec
    values = result if isinstance(result, tuple) else () if result is None else (result,)
    if len(values) != len(spec.outputs) or not all(isinstance(v, Tensor | None) for v in values):
        found = ", ".join(type(v).__name__ for v in values) or "None"
        wanted = ", ".join(spec.outputs) or "None"
        raise TypeError(f"{site.op} returned ({found}), its contract says ({wanted})")
    return spec.name_outputs(result)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
