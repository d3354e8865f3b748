"""The route's own run, kept op by op, going on where an implementation fails"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.layout import storage_key
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.probes.verdicts import broken_contract, raised


class RouteCapture(Capture):
    """Keeps the ops of the route's own run, and lets it go on where an implementation fails.

    `right`: the reference's calls by path. Where an implementation raises or breaks its contract
    the reference takes over on the same inputs, and if it cannot, its outputs of its own run do;
    `problems` has what happened, by path. An output that somebody overwrites before it is read is one.
    """

    def __init__(self, right: dict[str, Captured]) -> None:
        super().__init__()
        self.right = right
        self.problems: dict[str, Signature] = {}
        self._live: dict[int, list[tuple[str, str, Tensor, Tensor]]] = defaultdict(list)

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        self._check_reads(site, args)
        expected = self.right.get(site.path)
        count = len(self.calls)
        try:
            result = super().around(site, args)
        except Exception as error:  # of somebody's kernel: it may raise anything
            return self._replaced(site, args, raised(error))
        ours = self.calls[count]
        broken = broken_contract(expected, ours.outputs) if expected is not None else []
        if broken:
            del self.calls[count:]
            for name, before in ours.before.items():
                site.spec.bind(args, site.params)[name].copy_(before)
            assert broken[0].signature is not None
            return self._replaced(site, args, broken[0].signature)
        for name in site.spec.outputs:
            live = ours.outputs.get(name)
            if live is not None:
                ours.outputs[name] = live.clone()
                self._live[storage_key(live)].append((site.path, name, live, ours.outputs[name]))
        return result

    def _check_reads(self, site: Site, args: tuple[Any, ...]) -> None:
        """Whether the outputs that `site` is about to read are still what they were when returned."""
        for value in args:
            entries = self._live.get(storage_key(value), []) if isinstance(value, Tensor) else []
            for path, name, live, returned in entries:
                if not bits_equal(live, returned):
                    words = f"{name} is overwritten before {site.path} reads it: another op writes to its memory"
                    self.problems.setdefault(path, Signature("stale", words))

    def _replaced(self, site: Site, args: tuple[Any, ...], problem: Signature) -> Any:
        self.problems[site.path] = problem
        try:
            return site.spec.reference(*args, **site.params)
        except Exception:
            expected = self.right[site.path]
            values = [expected.outputs[name] for name in site.spec.outputs]
            return tuple(values) if len(values) > 1 else next(iter(values), None)
