"""Carried error: a run of the reference beside the session's own, layer by layer

The reference run has its own cache and is fed the tokens of the session's run. It is asked for one
layer at a time and catches up with what it has not computed yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Site, Stamp
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.metrics import masks_differ, relative_error
from dsv4_bench.workbench.snapshots import LayerSnapshot, take

EMBED = -1  # the layer before the first; the one after the last is the head


class ReferenceRun:
    """Outputs of every op of one layer as the reference has them.

    `between(forward, layer)` is called before every layer it runs: it may raise to stop a long
    catch-up, and the run goes on from there when it is asked again.
    """

    def __init__(
        self,
        model: Transformer,
        spans: Sequence[tuple[int, int]],
        between: Callable[[int, int], None],
    ) -> None:
        self.model = model
        self.spans = spans
        self.between = between
        self.clear()

    def clear(self) -> None:
        """Back to the first token."""
        self.cache = self.model.new_cache()
        self.forward = 0
        self.outputs: dict[str, Tensor] = {}  # by "site:output", of `layer`
        self.layer: int | None = None  # whose outputs are held
        self._next = EMBED  # the layer that runs next
        self._x = torch.empty(0)
        self._step: Any = None
        self._snapshots: dict[int, LayerSnapshot] = {}

    def hold(self, forward: int, layer: int, tokens: Sequence[int]) -> None:
        """Hold the outputs of `layer` in pass `forward` over `tokens`, running what is missing.

        Raises what `between` raises, and what an op raises; then the run starts over.
        """
        if (self.forward, self.layer) == (forward, layer):
            return
        if forward < self.forward:
            self.clear()
        if forward == self.forward and layer < self._next:
            self._go_back(layer)
        self.layer = None
        while self.forward < forward or self._next <= layer:
            if self._next > len(self.model.layers):
                self.cache.advance(self._step)
                self.forward, self._next = self.forward + 1, EMBED
                continue
            self.between(self.forward, self._next)
            try:
                self._run(self._next, tokens)
            except BaseException:
                self.clear()
                raise
            self._next += 1
        self.layer = layer

    def error(self, site: Site, outputs: dict[str, Tensor]) -> float | None:
        """The largest relative L2 of `outputs` against the reference run's; None if none compares.

        Infinite where the shapes or the non-finite values differ.
        """
        errors = []
        for name, value in outputs.items():
            theirs = self.outputs.get(f"{site.path}:{name}")
            if theirs is None or name in site.spec.discrete or not theirs.is_floating_point():
                continue
            if value.shape != theirs.shape or bool(masks_differ(value, theirs).any()):
                errors.append(float("inf"))
            else:
                errors.append(relative_error(value, theirs))
        return max(errors, default=None)

    def _go_back(self, layer: int) -> None:
        """Undo this forward pass down to before `layer`."""
        for index, snapshot in list(self._snapshots.items()):
            if index >= layer:
                if snapshot.cache:
                    self.cache.layers[index].restore(snapshot.cache)
                if index > layer:
                    del self._snapshots[index]
        self._next = layer
        if layer > EMBED:
            self._x = self._snapshots[layer].x

    def _run(self, layer: int, tokens: Sequence[int]) -> None:
        model = self.model
        if layer == EMBED:
            start, stop = self.spans[self.forward]
            self._step = self.cache.step([tokens[start:stop]])
            self._snapshots, group = {}, "embed"
        else:
            self._snapshots[layer] = take(self._x, self.cache, layer)
            group = f"L{layer}/" if layer < len(model.layers) else "head/"
        sites = [site for path, site in model.sites.items() if path.startswith(group)]
        nvtx.begin(self._step)
        with self._on_reference(sites):
            if layer == EMBED:
                self._x = model.embed(self._step.tokens)
            elif layer < len(model.layers):
                self._x = model.layers[layer](self._x, self.cache.layers[layer], self._step)
            else:
                model.head(model.last_rows(self._x, self._step))

    @contextmanager
    def _on_reference(self, sites: Sequence[Site]) -> Iterator[None]:
        """Inside, `sites` run their reference and leave their outputs here; route and tap return."""
        kept = [(site, site.impl, site.stamp, site.tap) for site in sites]
        self.outputs = {}
        try:
            for site in sites:
                site.put_back(IMPLEMENTATIONS[site.op]["reference"], Stamp())
                site.tap = self._keep
            yield
        finally:
            for site, impl, stamp, tap in kept:
                site.put_back(impl, stamp)
                site.tap = tap

    def _keep(self, site: Site, args: tuple[Any, ...]) -> Any:
        result = site.run(args)
        outputs = dict(site.spec.name_outputs(result))
        bound = site.spec.bind(args, site.params)
        outputs |= {name: bound[name].clone() for name in site.spec.mutates}
        for name, value in outputs.items():
            self.outputs[f"{site.path}:{name}"] = value
        return result
