"""Hot reload: kernels' sources and plugin files read again, the sites that use them switched

What counts is content: a file saved without a change reloads nothing. Compiled kernels are built
when they are next called, so an error of the compiler is raised there, with its lines.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine import cpu_library, cuda_library
from dsv4_bench.engine.build import csrc
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, Site
from dsv4_bench.probes.capture import Captured
from dsv4_bench.workbench.loading import load_plugins
from dsv4_bench.workbench.timing.clock import make_clock

_COMPILED = {"cpu": "cpu", "sm90": "cuda"}  # implementation -> its folder below csrc
_REPEATS, _SECONDS = 30, 0.2  # of the timing after a reload


def sources(impl: Implementation, plugins: Iterable[str] = ()) -> list[Path]:
    """The files whose change changes what `impl` does; empty for the reference."""
    if impl.name == "reference":
        return []
    if impl.name in _COMPILED:
        folders = (csrc() / _COMPILED[impl.name], csrc() / "common")
        return sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    own = inspect.getsourcefile(inspect.unwrap(impl.function))
    named = [Path(file).absolute() for file in plugins]
    return sorted({*named, *([Path(own).absolute()] if own else [])})


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the files' contents; a file that is gone for a moment counts as empty."""
    state = hashlib.sha256()
    for path in files:
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        state.update(f"{path} {len(data)} ".encode() + data)
    return state.hexdigest()[:12]


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
    cuda_library.reset()
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
    clock, values = make_clock(device), []
    started = time.perf_counter()
    while len(values) < 3 or (len(values) < _REPEATS and time.perf_counter() - started < _SECONDS):
        clock.evict()
        values.append(clock.seconds(lambda: call.run(impl.function)))
    return statistics.median(values)
