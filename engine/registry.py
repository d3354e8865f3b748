"""Ops, their implementations, sites and routes.

An *op* has one reference and any number of implementations with the same signature. A *site* is a
place in the forward pass that runs one op. A *route* says which implementation each site uses, and
the site's *stamp* says what really ran.

    @op("hc_post", doc=...)                        the reference, in ops/<op>.py
    @implementation(op="hc_post", name="mine")     anything else, same signature and contract
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from types import FunctionType
from typing import Any, ClassVar

import torch

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, did_you_mean

Function = Callable[..., Any]

# What the family `kernel` tries, best first, by device type.
KERNEL_ORDER = {"cpu": ("cpu",), "cuda": ("sm90+cutedsl", "sm90", "cutedsl")}


@dataclass(frozen=True)
class Context:
    """What a run looks like to an implementation that has to say whether it can serve it.

    `kv` is how the cache holds keys: "dtype" as `dtype`, "fp8" as packed entries (kv_entry.py).
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    kv: str = "dtype"


@dataclass(frozen=True)
class Cost:
    """Work of one call: bytes that must move at least once, floating-point operations."""

    bytes: int
    flops: int


@dataclass
class OpSpec:
    """The contract of an op; `reference` is its executable form.

    `outputs` names the returned tensors, `mutates` the arguments written in place, which count as
    outputs too. `nonfinite` names outputs in which -inf is expected. `flops` maps the bound
    arguments to floating-point operations; `traffic` maps arguments and outputs by name to bytes,
    for ops that do not touch all of what they are given.
    """

    name: str
    doc: str
    reference: Function
    outputs: tuple[str, ...]
    mutates: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    discrete: tuple[str, ...] = ()
    flops: Callable[[dict[str, Any]], int] | None = None
    traffic: Callable[[dict[str, Any]], int] | None = None
    parameters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = tuple(inspect.signature(self.reference).parameters)

    def bind(self, args: Sequence[Any], params: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, positional ones first."""
        return {**dict(zip(self.parameters, args, strict=False)), **params}

    def name_outputs(self, result: Any) -> dict[str, torch.Tensor]:
        """Returned tensors by output name; None results are left out."""
        values = result if isinstance(result, tuple) else (result,)
        return {n: v for n, v in zip(self.outputs, values, strict=False) if v is not None}

    def cost(self, args: Sequence[Any], params: dict[str, Any], result: Any) -> Cost:
        """Bytes that must move at least once and FLOPs, both 0 or more.

        Bytes are the op's own `traffic`, or those of all tensors in and out, with arguments that are
        written in place counted twice: read and written.
        """
        bound = self.bind(args, params)
        outputs = self.name_outputs(result)
        if self.traffic is not None:
            total = self.traffic({**bound, **outputs})
        else:
            moved = [*bound.values(), *outputs.values(), *(bound[name] for name in self.mutates)]
            total = sum(nbytes(value) for value in moved)
        return Cost(total, self.flops(bound) if self.flops else 0)


def nbytes(value: Any) -> int:
    """Bytes of a tensor, weight or expert; 0 for anything else."""
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


@dataclass
class Implementation:
    """One way to compute an op. `unavailable(context)` gives None or the reason why not."""

    op: str
    name: str
    function: Function
    requires: Callable[[Context], str | None] | None = None
    code: Callable[[], str] | None = None  # identity of compiled code, part of the stamp

    def unavailable(self, context: Context) -> str | None:
        return self.requires(context) if self.requires else None

    @cached_property
    def hash(self) -> str:
        """First 12 hex digits of the hash of the code that runs."""
        return hashlib.sha256(self._identity().encode()).hexdigest()[:12]

    def _identity(self) -> str:
        if self.code is not None:
            return self.code()
        try:
            return inspect.getsource(self.function)
        except (OSError, TypeError):
            compiled = getattr(self.function, "__code__", None)
            return repr(compiled.co_code if compiled else self.function)


OPS: dict[str, OpSpec] = {}
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def op(
    name: str,
    *,
    outputs: tuple[str, ...],
    mutates: tuple[str, ...] = (),
    nonfinite: tuple[str, ...] = (),
    discrete: tuple[str, ...] = (),
    flops: Callable[[dict[str, Any]], int] | None = None,
    traffic: Callable[[dict[str, Any]], int] | None = None,
) -> Callable[[Function], Function]:
    """Declare op `name`; the decorated function is its reference and its docstring the contract."""

    def register(function: Function) -> Function:
        doc = inspect.getdoc(function) or ""
        OPS[name] = OpSpec(
            name, doc, function, outputs, mutates, nonfinite, discrete, flops, traffic
        )
        IMPLEMENTATIONS.setdefault(name, {})["reference"] = Implementation(
            name, "reference", function
        )
        return function

    return register


def implementation(
    *,
    op: str,
    name: str,
    requires: Callable[[Context], str | None] | None = None,
    code: Callable[[], str] | None = None,
) -> Callable[[Function], Function]:
    """Register another implementation of `op`: same signature and contract as its reference.

    `requires(context)` returns None, or the reason why it cannot run there. Raises DSV4Error for an
    unknown op, or for the name `reference`.
    """
    spec = spec_of(op)
    if name in ("reference", "kernel"):
        raise DSV4Error(f"implementation of {op} may not be called {name!r}", "choose another name")

    def register(function: Function) -> Function:
        IMPLEMENTATIONS[spec.name][name] = Implementation(spec.name, name, function, requires, code)
        return function

    return register


def spec_of(name: str) -> OpSpec:
    if name not in OPS:
        raise DSV4Error(f"unknown op {name!r}", did_you_mean(name, OPS))
    return OPS[name]


def reference(name: str) -> Function:
    """The reference function of op `name`."""
    return spec_of(name).reference


def families() -> list[str]:
    """Every implementation name in use, `reference` first."""
    names = dict.fromkeys(["reference", "kernel"])
    for table in IMPLEMENTATIONS.values():
        names.update(dict.fromkeys(table))
    return list(names)


# ------------------------------------------------------------------------------ sites


@dataclass
class Stamp:
    """What ran at a site: implementation, hash of its code, calls, and why it is not what was asked."""

    implementation: str = "reference"
    hash: str = ""
    launches: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def with_constants(function: Function, constants: dict[str, Any]) -> Function:
    """`function` with keyword arguments that never change, for the fastest possible call.

    They become the defaults of its keyword-only parameters, which costs nothing at a call; a partial
    or ``**constants`` costs 100 ns. Anything but a plain function that names them gets a partial.
    """
    if not constants:
        return function
    if not isinstance(function, FunctionType):
        return partial(function, **constants)
    code = function.__code__
    keyword_only = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    if not constants.keys() <= set(keyword_only):
        return partial(function, **constants)
    bound = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    bound.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **constants}
    return bound


class Site:
    """A place in the forward pass with a stable path; calling it runs its op on its route.

    `params` are the op's keyword arguments that never change (weights, constants); `use` binds
    them. `tap`, when set, takes over the call; see probes/tap.py. `switches` counts the changes of
    implementation at all sites.
    """

    switches: ClassVar[int] = 0
    # What goes around every op that runs from the next `use` on: NVTX ranges while something records.
    wrap: ClassVar[Callable[[Site, Function], Function] | None] = None
    __slots__ = ("_run", "impl", "layer", "op", "params", "path", "spec", "stamp", "tap")

    def __init__(self, path: str, spec: OpSpec, params: dict[str, Any], layer: int | None) -> None:
        self.path = path
        self.spec = spec
        self.op = spec.name
        self.params = params
        self.layer = layer
        self.tap: Callable[[Site, tuple[Any, ...]], Any] | None = None
        self.use(IMPLEMENTATIONS[spec.name]["reference"])

    def __call__(self, *args: Any) -> Any:
        if self.tap is None:
            return self._run(*args)
        return self.tap(self, args)

    def run(self, args: tuple[Any, ...]) -> Any:
        """Run the op on its route, without the tap."""
        self.stamp.launches += 1
        return self._run(*args)

    def use(self, impl: Implementation, note: str = "") -> None:
        """Switch to `impl`; the stamp starts over."""
        self.put_back(impl, Stamp(impl.name, impl.hash, 0, note))

    def put_back(self, impl: Implementation, stamp: Stamp) -> None:
        """Use `impl` with a stamp it had before: undoes a `use`."""
        Site.switches += 1
        self.impl, self.stamp = impl, stamp
        run = with_constants(impl.function, self.params)
        self._run = run if Site.wrap is None else Site.wrap(self, run)

    def __repr__(self) -> str:
        return f"Site({self.path}, {self.op}={self.stamp.implementation})"


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` (a glob, or the path of a group such as ``L3/attn``) covers the site."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern + "/*")


def select_sites(sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites under `pattern`. Raises DSV4Error with a hint when there is none."""
    table = list(sites)
    found = [site for site in table if matches(site.path, pattern)]
    if not found:
        paths = [site.path for site in table]
        groups = [path.rpartition("/")[0] for path in paths]
        globs = ["*/" + path.rpartition("/")[2] for path in paths]
        known = paths if "*" not in pattern else [*globs, *paths]
        raise DSV4Error(
            f"no site matches {pattern!r}", did_you_mean(pattern, filter(None, [*known, *groups]))
        )
    return found


# ------------------------------------------------------------------------------ routes


@dataclass(frozen=True)
class RouteEntry:
    """`pattern=name`: the sites under `pattern` use `name`, an implementation or `kernel`."""

    pattern: str
    name: str
    explicit: bool  # a pattern was written: then a missing implementation is an error

    def __str__(self) -> str:
        return f"{self.pattern}={self.name}" if self.explicit else self.name


def parse_route(texts: Iterable[str]) -> list[RouteEntry]:
    """Parse ``kernel``, ``reference``, ``*/hc_post=mine``; raises DSV4Error for unknown names."""
    entries = []
    for text in texts:
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            pattern, equals, name = part.rpartition("=")
            name = name.strip()
            if name not in families():
                raise DSV4Error(
                    f"unknown implementation {name!r} in route {part!r}",
                    did_you_mean(name, families()),
                )
            entries.append(RouteEntry(pattern.strip() or "*", name, bool(equals)))
    return entries


def choose(site_op: str, name: str, context: Context) -> tuple[Implementation, str]:
    """The implementation of `site_op` for route name `name`, and a note when it is a fallback."""
    table = IMPLEMENTATIONS[site_op]
    if name == "kernel":
        reasons = []
        for candidate in KERNEL_ORDER.get(context.device, ()):
            impl = table.get(candidate)
            if impl is None:
                continue
            reason = impl.unavailable(context)
            if reason is None:
                return impl, ""
            reasons.append(f"{candidate}: {reason}")
        return table["reference"], "; ".join(reasons) or f"no kernel for {context.device}"
    impl = table.get(name)
    if impl is None:
        return table["reference"], f"{name}: not implemented for {site_op}"
    reason = impl.unavailable(context)
    if reason is not None:
        return table["reference"], f"{name}: {reason}"
    return impl, ""


def apply_route(sites: Iterable[Site], entries: Sequence[RouteEntry], context: Context) -> None:
    """Give every site the implementation its last matching entry names (`reference` if none).

    Where an entry cannot be served the reference runs and the stamp's note says why. An entry
    written with a pattern that is served at no site raises CannotAnswer, one that matches no site
    raises DSV4Error; in both cases no site has changed.
    """
    table = list(sites)
    plan = {site.path: choose(site.op, "reference", context) for site in table}
    for entry in entries:
        covered = select_sites(table, entry.pattern)
        for site in covered:
            plan[site.path] = choose(site.op, entry.name, context)
        notes = [plan[site.path][1] for site in covered]
        if entry.explicit and entry.name != "kernel" and all(notes):
            raise CannotAnswer(f"route {entry}: {notes[0]}", "see `dsv4-bench kernels`")
    for site in table:
        impl, note = plan[site.path]
        if site.impl is not impl or site.stamp.note != note:
            site.use(impl, note)
