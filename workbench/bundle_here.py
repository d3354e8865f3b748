"""`bundle` in a session: the layer it stands in, run once more on the side and written as a bundle"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv4_bench.engine.cache import LayerCache
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import Site, matches
from dsv4_bench.probes import bundle
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.workbench.bundles.bundling import RunFacts, Written, write_bundle
from dsv4_bench.workbench.debugger import Debugger


class _Told(Capture):
    """A Capture that says which op runs, so that a death is laid at its door."""

    def __init__(
        self,
        wanted: Callable[[Site], bool],
        stored: Callable[[], Iterable[Tensor]],
        tell: Callable[[Site], None],
    ) -> None:
        super().__init__(wanted, stored)
        self.tell = tell

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        self.tell(site)
        return super().around(site, args) if self.wanted(site) else site.run(args)


def write_bundle_here(
    debugger: Debugger, target: Path, pattern: str, layout: str, command: list[str]
) -> Written:
    """Capture the sites under `pattern` in the layer where the session stands, and write them.

    The layer runs again on its present routes, from its snapshot, with a cache of its own; position
    and numbers of the session stay as they are. Raises DSV4Error for a session that has not begun, an
    op that raises, a pause, or a target that cannot be written.
    """
    if debugger.index < 0:
        raise DSV4Error("nothing has run yet", "`step` runs the first op")
    layer = debugger.layer_at(debugger.index)
    captured = capture_layer(debugger, layer, pattern, "bundle")
    calls = []
    for number, call in enumerate(captured, 1):
        if debugger.pause:
            raise DSV4Error(f"bundle: paused at op {number} of {len(captured)}; nothing is written")
        debugger.tell_running(call.site, call.site.impl)
        calls.append(bundle.examine(call, debugger.forward, debugger.shadow.judge.limits))
    paths = {call.site.path for call in captured}
    readings = [r for r in debugger.readings.values() if r.site in paths]
    spans = debugger.spans[: debugger.forward + 1]
    facts = RunFacts(
        tokens=debugger.tokens[: debugger.span[1]],
        chunks=[stop - start for start, stop in spans],
        layout=layout,
        command=command,
        selected=len(captured),
    )
    limits = debugger.shadow.judge.limits
    return write_bundle(target, debugger.model, facts, calls, readings, limits)


def capture_layer(debugger: Debugger, layer: int, pattern: str, command: str) -> list[Captured]:
    """The ops of `layer` (-1 embed, one past the last: head) under `pattern`, as they run now.

    Errors name `command`, which asked for them.
    """
    model, step = debugger.model, debugger.step
    assert step is not None
    snapshot = debugger.snapshots.get(layer)
    if snapshot is None and layer >= 0:
        raise DSV4Error(f"layer {layer} began in a worker that is gone", "`step` on from here")
    sites = debugger.sites_of(layer)
    if not any(matches(site.path, pattern) for site in sites):
        raise DSV4Error(
            f"no site of this layer matches {pattern!r}",
            f"the session stands in {sites[0].path.partition('/')[0]}; `goto` another layer",
        )
    caches: list[LayerCache] = []
    observer = _Told(
        lambda site: matches(site.path, pattern),
        lambda: [tensor for cache in caches for tensor in cache.tensors().values()],
        lambda s: debugger.tell_running(s, s.impl),
    )
    before = [(site, site.tap, site.stamp.launches) for site in sites]
    try:
        for site in sites:
            site.tap = observer.around
        if snapshot is None:
            model.embed(step.tokens)
        elif layer == len(model.layers):
            model.head(model.last_rows(snapshot.x, step))
        else:
            cache = LayerCache(model.config, layer, len(step.starts), model.dtype, model.device)
            cache.restore(snapshot.cache)
            caches.append(cache)
            model.layers[layer](snapshot.x, cache, step)
    except DSV4Error:
        raise
    except Exception as error:  # of somebody's kernel: it may raise anything
        raise DSV4Error(
            f"{command}: {type(error).__name__}: {error}", "switch its route"
        ) from error
    finally:
        for site, tap, launches in before:
            site.tap, site.stamp.launches = tap, launches
    return observer.calls
