"""Hot reload: kernels' sources and plugin files read again, the sites that use them switched

What counts is content: a file saved without a change reloads nothing. Compiled kernels are built
when they are next called, so an error of the compiler is raised there, with its lines.
"""

from __future__ import annotations

import importlib
import inspect
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine import cpu_library, cuda
from dsv4_bench.engine.build import csrc
from dsv4_bench.engine.dsl import library as dsl_library
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, Site
from dsv4_bench.probes.capture import Captured, within
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.loading import load_plugins
from dsv4_bench.workbench.records import Held
from dsv4_bench.workbench.saving import fingerprint
from dsv4_bench.workbench.shadow import Shadow
from dsv4_bench.workbench.timing import history
from dsv4_bench.workbench.timing.clock import make_clock
from dsv4_bench.workbench.timing.sites import Effort, interleave, prepared
from dsv4_bench.workbench.timing_here import remember

_COMPILED = {"cpu": "cpu", "sm90": "cuda"}  # implementation -> its folder below csrc
_KEPT = 200  # attempts of a session
_EFFORT = Effort(seconds=0.2, least=3, most=30)  # of the timing after a reload


def sources(impl: Implementation, plugins: Iterable[str] = ()) -> list[Path]:
    """The files whose change changes what `impl` does; empty for the reference."""
    names = impl.name.split("+")  # the kernels of two together are called so
    if names == ["reference"]:
        return []
    if all(name in (*_COMPILED, "cutedsl") for name in names):
        return sorted({path for name in names for path in _of_package(name)})
    own = inspect.getsourcefile(inspect.unwrap(impl.function))
    named = [Path(file).absolute() for file in plugins]
    return sorted({*named, *([Path(own).absolute()] if own else [])})


def _of_package(name: str) -> Iterable[Path]:
    """The sources of our own implementation `name`."""
    if name == "cutedsl":
        return dsl_library.FOLDER.glob("*.py")
    folders = (csrc() / _COMPILED[name], csrc() / "common")
    return (path for folder in folders for path in folder.iterdir() if path.is_file())


def reload_code(model: Transformer, plugins: Iterable[str] = ()) -> list[str]:
    """Read all code again and put every site on the new one; the paths of the sites that changed.

    Raises DSV4Error for a Python file that does not run; then everything is as it was.
    """
    before = {op: dict(table) for op, table in IMPLEMENTATIONS.items()}
    try:
        load_plugins(list(plugins))
        for module in _python_kernels(model):
            importlib.reload(module)
    except DSV4Error:
        _put_back(before)
        raise
    except Exception as error:
        _put_back(before)
        raise DSV4Error(
            f"reload: {type(error).__name__}: {error}", "fix it and save again"
        ) from error
    cpu_library.reset()
    cuda.library.reset()
    dsl_library.reset()
    for table in IMPLEMENTATIONS.values():
        for impl in table.values():
            impl.__dict__.pop("hash", None)  # of the code that was
    return [site.path for site in model.sites.values() if _refresh(site)]


def _put_back(tables: dict[str, dict[str, Implementation]]) -> None:
    for op, table in tables.items():
        IMPLEMENTATIONS[op].clear()
        IMPLEMENTATIONS[op].update(table)


def _python_kernels(model: Transformer) -> list[Any]:
    """Modules of ours that define kernels in Python (CuTe-DSL) which some site uses."""
    names = {site.impl.function.__module__ for site in model.sites.values()}
    ours = sorted(name for name in names if name.startswith("dsv4_bench.engine.dsl."))
    return [sys.modules[name] for name in ours]


def _refresh(site: Site) -> bool:
    """Put a site on the present code of its implementation; whether that is another."""
    impl = IMPLEMENTATIONS[site.op].get(site.impl.name, site.impl)
    if impl is site.impl and impl.hash == site.stamp.hash:
        return False
    site.use(impl, site.stamp.note)
    return True


def seconds_of(call: Captured, impl: Implementation, device: torch.device) -> float:
    """Median time of `impl` on a captured op, in-place arguments as they were."""
    timed = {impl.name: prepared(call, impl, make_clock(device))}
    return statistics.median(interleave(timed, _EFFORT)[impl.name])


def _entry(attempt: dict[str, Any]) -> history.Entry:
    names = ("hash", "seconds", "own_error", "limit", "verdict")
    measured = {name: attempt[name] for name in names if name in attempt}
    place = attempt["site"], attempt["implementation"]
    return history.Entry(*place, **measured, problem=attempt["error"])


@contextmanager
def _compared(shadow: Shadow, site: Site) -> Iterator[None]:
    """Compare `site` with the reference, whatever the user has on."""
    pattern = shadow.pattern
    if not shadow.covers(site.path):
        shadow.pattern = site.path
    try:
        yield
    finally:
        shadow.pattern = pattern


class Reloader:
    """Hot reload of the op a session stands at; `history` has every attempt, oldest first.

    An attempt: the code's hash, own error with limit and verdict, median seconds, and how long it
    took from noticing the change (`took`); or the `error` that building or running it gave.
    """

    def __init__(self, debugger: Debugger, plugins: Iterable[str]) -> None:
        self.debugger = debugger
        self.plugins = list(plugins)
        self.history: list[dict[str, Any]] = []
        self._seen: dict[str, str] = {}  # implementation -> fingerprint of its sources

    def reload(self) -> dict[str, Any]:
        """Take up changed code, and run the held op on it. Cheap when nothing has changed.

        Raises DSV4Error when the session stands at no op.
        """
        held = self.debugger.held
        if held is None:
            raise DSV4Error("the session stands at no op", "`until SITE` goes to one")
        site = held.call.site
        files = sources(site.impl, self.plugins)
        if "cutedsl" in site.impl.name.split("+"):
            dsl_library.keep_warm()
        found = fingerprint(files)
        changed = self._seen.get(site.impl.name) != found
        if changed:
            self._seen[site.impl.name] = found
            attempt = self._attempt(held)
            self.history = [*self.history[1 - _KEPT :], attempt]
            remember(self.debugger, "watch", [_entry(attempt)])
        return {
            "reloaded": changed,
            "site": site.path,
            "files": [str(path) for path in files],
            "history": self.history,
        }

    def _attempt(self, held: Held) -> dict[str, Any]:
        debugger, site = self.debugger, held.call.site
        started = time.perf_counter()
        attempt: dict[str, Any] = {"site": site.path, "implementation": site.impl.name, "error": ""}
        try:
            reload_code(debugger.model, self.plugins)
            with _compared(debugger.shadow, site):
                debugger.rerun_held()
        except (Exception, SystemExit) as error:
            text = (
                error.message
                if isinstance(error, DSV4Error)
                else f"{type(error).__name__}: {error}"
            )
            return {**attempt, "error": text, "took": time.perf_counter() - started}
        record = debugger.records[site.path]
        cache = [t for layer in debugger.cache.layers for t in layer.tensors().values()]
        cached = within(held.call.inputs, cache)
        call = Captured(site, held.args, held.call.before, cached=cached)
        with torch.inference_mode():
            seconds = seconds_of(call, site.impl, debugger.model.device)
        own = record.own_error
        return {
            **attempt,
            "hash": site.stamp.hash,
            "own_error": own.relative_l2 if own else None,
            "limit": own.limit if own else None,
            "verdict": own.verdict if own else "",
            "seconds": seconds,
            "took": time.perf_counter() - started,
        }
