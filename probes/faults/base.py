"""What a fault is: a wrong implementation of an op, with the verdict it deserves decided beforehand

    @fault(op="hc_post", sites="L2/attn/hc_post", kinds="transposed", source="DESIGN")
    def comb_transposed(y, x, post, comb):
        "The mixing sum runs over the second index of comb."
        return reference("hc_post")(y, x, post, comb.transpose(1, 2))

registers the implementation `fault/comb_transposed`. A fault does the reference's maths in float32
and is wrong in one way. A combination is several functions under one name: each is right alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import IMPLEMENTATIONS, implementation
from dsv4_bench.probes.signatures import KINDS

PREFIX = "fault/"
Function = Callable[..., Any]


@dataclass
class Fault:
    """One bug. `parts` maps each op it breaks to the wrong function (several: a combination).

    `sites` are the default globs, one a part; `kinds` the names of the bug, by its definition;
    `why` says why more than one name is right. `layout` is the checkpoint it needs to show and
    `data` what the weights must hold, in words, with `prepare` to make a model's weights so.
    A `combination` is wrong only when all its parts are on.
    """

    name: str
    kinds: tuple[str, ...]
    source: str
    doc: str
    why: str = ""
    layout: str = "nvfp4-dense"
    data: str = ""
    prepare: Callable[[Any], None] | None = None
    knockout: bool = False
    combination: bool = False
    family: str = ""
    parts: dict[str, Function] = field(default_factory=dict)
    sites: tuple[str, ...] = ()

    @property
    def route(self) -> list[str]:
        """Route entries that switch it on at its default sites."""
        return [f"{glob}={PREFIX}{self.name}" for glob in self.sites]

    @property
    def everywhere(self) -> list[str]:
        """Route entries that switch it on in every layer."""
        # A wrong mHC kernel is wrong in both sublayers.
        layer = re.compile(r"^L\d+/((attn|ffn)/(?=hc_))?")
        globs = dict.fromkeys(layer.sub("*/", glob) for glob in self.sites)
        return [f"{glob}={PREFIX}{self.name}" for glob in globs]


FAULTS: dict[str, Fault] = {}
# What kernels with memory remember: buffers, tables, counters. `forget` makes them new.
STATE: dict[Any, Any] = {}


def fault(
    *,
    op: str,
    sites: str,
    kinds: str,
    source: str = "",
    name: str = "",
    **more: Any,
) -> Callable[[Function], Function]:
    """Register the decorated function, of the op's signature, as `fault/<its name>`.

    `kinds` are names of probes/signatures.KINDS separated by spaces; the docstring's first line
    says what is wrong. A `name` that exists already makes the function another part of that fault.
    Raises DSV4Error for an unknown kind or op, a missing docstring, or the same part twice.
    """

    def register(function: Function) -> Function:
        title = name or function.__name__
        known = FAULTS.get(title)
        if known is not None and (op in known.parts or not known.combination):
            raise DSV4Error(f"fault {title!r} exists", "choose another name")
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        if not doc:
            raise DSV4Error(f"fault {title!r} has no docstring", "one line: what is wrong")
        names = tuple(kinds.split())
        for kind in names:
            if kind not in KINDS:
                raise DSV4Error(
                    f"fault {title!r}: unknown kind {kind!r}", did_you_mean(kind, KINDS)
                )
        implementation(op=op, name=PREFIX + title)(function)
        found = known or Fault(title, names, source, doc, **more)
        # A module of the catalogue, or the file name of a plugin.
        found.family = re.sub(r"^dsv4_plugin_\d+_", "", function.__module__.rpartition(".")[2])
        found.parts[op] = function
        found.sites = (*found.sites, *sites.split())
        FAULTS[title] = found
        return function

    return register


def select_faults(patterns: list[str]) -> list[Fault]:
    """The faults whose name or family matches one of the globs, all faults for none.

    Knock-outs are no faults: only their own name or family selects them. Raises DSV4Error for a
    pattern that matches nothing.
    """
    chosen: dict[str, Fault] = {}
    for pattern in patterns or ["*"]:
        plain = pattern.removeprefix(PREFIX)
        found = {
            name: fault
            for name, fault in FAULTS.items()
            if (fnmatchcase(name, plain) and not fault.knockout) or plain in (name, fault.family)
        }
        if not found:
            raise DSV4Error(f"no fault matches {pattern!r}", did_you_mean(plain, FAULTS))
        chosen |= found
    return list(chosen.values())


@contextmanager
def registered_for_a_while() -> Iterator[None]:
    """Faults registered inside are gone afterwards; for tests and for plugins that are tried."""
    before = dict(FAULTS)
    tables = {op: dict(table) for op, table in IMPLEMENTATIONS.items()}
    try:
        yield
    finally:
        FAULTS.clear()
        FAULTS.update(before)
        for op, table in tables.items():
            IMPLEMENTATIONS[op].clear()
            IMPLEMENTATIONS[op].update(table)


# ------------------------------------------------------------------------------ for kernels

_right = "reference"


def right(op: str) -> Function:
    """The op as it should be, for faults that spoil its arguments or its result.

    That is the reference, but inside `computed_by` another implementation where there is one.
    """

    def run(*args: Any, **params: Any) -> Any:
        table = IMPLEMENTATIONS[op]
        return table.get(_right, table["reference"]).function(*args, **params)

    return run


@contextmanager
def computed_by(implementation: str) -> Iterator[None]:
    """Faults that need an op done right use `implementation` inside, for speed."""
    global _right
    before, _right = _right, implementation
    try:
        yield
    finally:
        _right = before


def forget() -> None:
    """Every fault's memory is that of a fresh process."""
    STATE.clear()


def remembered(key: Any, make: Callable[[], Any]) -> Any:
    """What is kept under `key`, made now if nothing is."""
    if key not in STATE:
        STATE[key] = make()
    return STATE[key]


def altered(weight: Weight, how: Callable[[Weight], Weight]) -> Weight:
    """`how(weight)`, made once a weight."""
    # The original is kept too, so that its id stays its own.
    return remembered((how, id(weight)), lambda: (how(weight), weight))[0]


def with_parts(weight: Weight, **changes: Any) -> Weight:
    """A copy of `weight` with some fields replaced, without what was cached for the original."""
    return replace(weight, _dense=None, **changes)


def call_number(key: Any) -> int:
    """0, 1, 2, ... for successive calls."""
    STATE[key] = STATE.get(key, -1) + 1
    return STATE[key]


def noise_of_call(key: Any, like: Tensor) -> Tensor:
    """Standard normal noise of `like`'s shape: the same in every process, another in every call."""
    generator = torch.Generator().manual_seed(7919 * call_number(key) + 17)
    return torch.randn(like.shape, generator=generator).to(like.device)


def rounded(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x after a trip through `dtype`."""
    return x.to(dtype).to(x.dtype)
