"""Puts replay.py of a bundle together: `standalone.py` with the references of the ops in it"""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from dsv4_bench.engine import numerics, step
from dsv4_bench.engine.ops import (
    attention,
    compressor,
    embed,
    experts,
    gate,
    hyper,
    indexer,
    kv,
    linear,
    norm,
    rope,
)
from dsv4_bench.probes.bundle import standalone

_MARKER = "# @references@\n"
# In an order in which what is used while a module loads stands before it.
_MODULES = (
    numerics, step, linear, rope, embed, hyper, norm, kv, compressor, indexer, attention, gate, experts,
)  # fmt: skip


def standalone_script() -> str:
    """The source of replay.py."""
    template = inspect.getsource(standalone)
    parts = "".join(_embedded(module) for module in _MODULES)
    head, _, tail = template.partition(_MARKER)
    return head + parts + tail


def _embedded(module: ModuleType) -> str:
    """The module's source without its docstring and without what it imports from this package."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("dsv4_bench", "__future__")
        )
        if docstring or ours:
            assert node.end_lineno is not None
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    body = "\n".join(lines).strip("\n")
    while "\n\n\n\n" in body:
        body = body.replace("\n\n\n\n", "\n\n\n")
    name = module.__name__.removeprefix("dsv4_bench.").replace(".", "/")
    return f"\n\n# ---- {name}.py\n\n{body}\n"
