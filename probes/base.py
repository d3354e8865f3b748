"""The probe protocol and the table of probes.

A probe is a small class; register it with `@probe`, from here or from a user's --plugin file:

    from dsv4_bench.probes.base import Probe, probe

    @probe
    class Peak(Probe):
        name = "peak"
        help = "largest absolute output of every linear"

        def wants(self, site):
            return site.op == "linear"

        def observe(self, call):
            yield call.reading(self.name, "peak", call.outputs["y"].abs().max())

A value may be a tensor: on an accelerator it stays there until the pass is over, and all values are
fetched together. To judge one, give `verdict` a rule instead of a word: `at_most(4.0)`. Statistics
cost least where `observe` asks for them (`call.ask("stats", "y")`) and `explain` reads them
(`call.stats("y").abs_max`): on an accelerator one launch then takes those of a whole layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.readings import Call, Reading


class Probe:
    """Looks at the ops it wants, after they ran. One instance lives as long as a session.

    `reads` names its readings, so that a breakpoint on one of them can turn the probe on. `captures`
    says that `observe` looks at the call's tensors alone, and at nothing that the host knows of the
    step: then the probe works in a CUDA graph, where `observe` runs once, and its values and answers
    come at every replay.
    """

    name = ""
    help = ""
    reads: tuple[str, ...] = ()
    captures = False

    def wants(self, site: Site) -> bool:
        raise NotImplementedError

    def observe(self, call: Call) -> Iterable[Reading]:
        """Readings of a call, right after the op; changes no tensor."""
        raise NotImplementedError

    def explain(self, call: Call) -> Iterable[Reading]:
        """More readings, once what `observe` has asked for is known (see `Call.ask`).

        Also for what takes a closer look, and only where something is wrong.
        """
        return ()

    def reset(self) -> None:
        """Forget what was seen; called when a session starts over."""


PROBES: dict[str, type[Probe]] = {}


def probe(cls: type[Probe]) -> type[Probe]:
    """Register a probe class under its `name`."""
    if not cls.name:
        raise DSV4Error(f"probe class {cls.__name__} has no name", "set the class attribute `name`")
    PROBES[cls.name] = cls
    return cls


def make_probes(names: Iterable[str]) -> list[Probe]:
    """Instances of the named probes; ``all`` stands for every one. Raises for an unknown name."""
    import dsv4_bench.probes.catalogue  # noqa: F401  (registers the built-in ones)

    wanted = list(dict.fromkeys(names))
    if "all" in wanted:
        wanted = list(PROBES)
    for name in wanted:
        if name not in PROBES:
            raise DSV4Error(f"unknown probe {name!r}", did_you_mean(name, PROBES))
    return [PROBES[name]() for name in wanted]


def probe_that_reads(reading: str) -> str | None:
    """The probe that takes readings called `reading`."""
    import dsv4_bench.probes.catalogue  # noqa: F401

    return next((name for name, cls in PROBES.items() if reading in cls.reads), None)
