"""`compare` in a session: two bundles side by side, and the map of one difference"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.bundle import open_bundle
from dsv4_bench.probes.error_map import error_map
from dsv4_bench.workbench.bundles.diffing import diff
from dsv4_bench.workbench.heat import Request, area_of


class Comparing:
    """Two open bundles and what differs between them.

    `progress(text, done, total)` may raise to end the comparison.
    """

    def __init__(self, a: str, b: str, progress: Callable[[str, int, int], None]) -> None:
        self.names = (a, b)
        self.bundles = (open_bundle(Path(a)), open_bundle(Path(b)))
        self.report = diff(*self.bundles, progress)

    def to_dict(self) -> dict[str, Any]:
        """The report of `diff --json`, and the names of the two."""
        return {**self.report.to_dict(), "a": self.names[0], "b": self.names[1]}

    @torch.inference_mode()
    def difference(self, number: int, request: Request) -> dict[str, Any]:
        """The map of B's outputs against A's, of op `number` in the report's order.

        Raises DSV4Error for a number or an output that is not there, and for what cannot be drawn.
        """
        ops = self.report.ops
        if not 0 <= number < len(ops):
            raise DSV4Error(f"no op {number}", f"the comparison has ops 0 to {len(ops) - 1}")
        op = ops[number]
        a, b = (
            next(
                bundle.load(entry).captured.outputs
                for entry in bundle.calls
                if (entry.site.path, entry.forward) == (op.site, op.forward)
            )
            for bundle in self.bundles
        )
        name = request.output or op.output
        if name not in a or name not in b:
            known = ", ".join(name for name in a if name in b) or "none"
            raise DSV4Error(f"{op.site} has no output {name!r} in both", f"outputs: {known}")
        found = error_map(b[name], a[name], *request.cells, area_of(a[name], request))
        return {
            **found.to_dict(),
            "site": op.site,
            "output": name,
            "outputs": [name for name in a if name in b],
            "route": f"B {op.b}",
            "against": f"A {op.a}",
        }
