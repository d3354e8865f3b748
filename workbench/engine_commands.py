"""The session commands that run in the worker: one method `do_<name>` per row of the table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.registry import Site, matches, select_sites
from dsv4_bench.probes.base import PROBES, make_probes, probe_that_reads
from dsv4_bench.probes.honesty import measure
from dsv4_bench.workbench import goals, views
from dsv4_bench.workbench.asking import Restart, Rewind
from dsv4_bench.workbench.breakpoints import Breakpoint, parse_breakpoint
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.heat import heat_view, parse_request
from dsv4_bench.workbench.loading import read_route
from dsv4_bench.workbench.reloading import Reloader, sources

if TYPE_CHECKING:
    from dsv4_bench.workbench.comparing import Comparing

_TEXT_LIMIT = 20000  # characters of a printed value
_PRINT = {"threshold": 400, "edgeitems": 4, "linewidth": 120, "precision": 6, "sci_mode": None}


class EngineCommands:
    """Handlers; each takes the parsed arguments and returns the reply's result.

    A handler of a command that runs sets `debugger.goal` (and may raise Rewind); its reply is the
    state at the next stop.
    """

    def __init__(
        self,
        debugger: Debugger,
        tokenizer: Any = None,
        plugins: Sequence[str] = (),
        layout: str = "",
    ) -> None:
        self.debugger = debugger
        self.tokenizer = tokenizer
        self.layout = layout
        self.comparing: Comparing | None = None
        self.watches: list[str] = []
        self.reloader = Reloader(debugger, plugins)

    def state(self) -> dict[str, Any]:
        debugger = self.debugger
        extra = {"text": self.decode(debugger.generated), "top": self._top()}
        return {**views.state_view(debugger, extra), "watches": self._watch_values()}

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer is not None and ids else ""

    def _top(self) -> list[dict[str, Any]]:
        """The best next tokens, when the session stands at the logits or has finished."""
        debugger = self.debugger
        logits = debugger.logits if debugger.state == "finished" else None
        if debugger.held is not None and debugger.site == "head/logits":
            logits = debugger.held.call.outputs.get("y")
        if logits is None or logits.dim() != 2:
            return []
        last = logits[-1].float()
        best = last.softmax(-1).topk(min(5, len(last)))
        return [
            {"id": i, "text": self.decode([i]), "logit": float(last[i]), "p": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    # -- move

    def _must_be_able_to_run(self) -> None:
        if self.debugger.state == "finished":
            raise DSV4Error("the run is finished", "`goto LAYER` goes back, `reset` starts over")

    def _go(self, goal: goals.Goal) -> None:
        self._must_be_able_to_run()
        self.debugger.goal = goal

    def do_step(self, n: int = 1) -> None:
        self._go(goals.Steps(count=n))

    def do_next(self, n: int = 1) -> None:
        debugger = self.debugger
        self._go(goals.Over(group=goals.level_of(debugger.order, debugger.index), count=n))

    def do_finish(self) -> None:
        self._go(goals.EndOfGroup(group=goals.group_of(self.debugger.site or "")))

    def do_layer(self, n: int = 1) -> None:
        self._go(goals.Layers(count=n))

    def do_continue(self) -> None:
        self._go(goals.Run())

    def do_anomaly(self) -> None:
        self._go(goals.Anomaly())

    def do_until(self, site: str) -> None:
        select_sites(self.debugger.model.sites.values(), site)
        self._go(goals.Until(pattern=site))

    def do_back(self, n: int = 1) -> None:
        debugger = self.debugger
        target = debugger.index - n
        if target < 0:
            raise DSV4Error("this is the first op of the forward pass", "`reset` starts over")
        self._rewind_to(target, "back")

    def do_rerun(self) -> None:
        if self.debugger.index < 0:
            raise DSV4Error("nothing has run yet", "`step` runs the first op")
        self._rewind_to(self.debugger.index, "rerun")

    def do_goto(self, layer: int) -> None:
        count = len(self.debugger.model.layers)
        if not 0 <= layer < count:
            raise DSV4Error(f"layer {layer} does not exist", f"layers are 0 to {count - 1}")
        debugger, last = self.debugger, f"L{layer}/ffn/hc_post"
        if not debugger.order:
            self._go(goals.Until(pattern=last, exact=True))
            return
        target = debugger.order.index(last)
        if target > debugger.index and not debugger.complete:
            self._go(goals.Index(exact=True, index=target, why=f"end of L{layer}"))
        else:
            self._rewind_to(target, f"end of L{layer}")

    def _rewind_to(self, index: int, why: str) -> None:
        """Run again from the snapshot of the layer that op `index` is in."""
        debugger = self.debugger
        layer = debugger.layer_at(index)
        first = min(debugger.snapshots, default=0)  # above 0 in a worker that resumed there
        if layer < first and (layer >= 0 or first > 0):
            raise DSV4Error(
                f"{debugger.order[index]} ran in a worker that is gone; this one began at L{first}",
                "`reset` starts over",
            )
        debugger.goal = goals.Index(exact=True, index=index, why=why)
        raise Rewind(layer)

    def do_reset(self) -> None:
        raise Restart

    def do_pause(self) -> dict[str, Any]:
        self.debugger.pause = False
        return self.state()

    # -- change

    def do_route(self, entry: str = "") -> dict[str, Any]:
        debugger = self.debugger
        if not entry:
            return {
                "changed": [],
                "route": [str(e) for e in debugger.model.route],
                "state": self.state(),
            }
        new = read_route([entry])
        patterns = {e.pattern for e in new}
        kept = [
            e for e in debugger.model.route if e.pattern not in patterns and "*" not in patterns
        ]
        return self._change_route([*kept, *new], [s for e in new for s in self._sites(e.pattern)])

    def do_toggle(self, site: str = "") -> dict[str, Any]:
        pattern = site or self.debugger.site
        if not pattern:
            raise DSV4Error("no site to toggle", "give one, e.g. `toggle */attn/core`")
        first = self._sites(pattern)[0]
        target = "kernel" if first.stamp.implementation == "reference" else "reference"
        return self.do_route(f"{pattern}={target}")

    def do_reload(self) -> dict[str, Any]:
        return self.reloader.reload()

    def do_sources(self, site: str = "") -> dict[str, Any]:
        pattern = site or self.debugger.site
        if not pattern:
            raise DSV4Error("no op has run yet", "give a site, or `step`")
        first = self._sites(pattern)[0]
        files = [str(path) for path in sources(first.impl, self.reloader.plugins)]
        return {"site": first.path, "implementation": first.impl.name, "files": files}

    def _sites(self, pattern: str) -> list[Site]:
        return select_sites(self.debugger.model.sites.values(), pattern)

    def _change_route(self, entries: list[Any], asked: list[Site]) -> dict[str, Any]:
        debugger, model = self.debugger, self.debugger.model
        before = {path: s.stamp.to_dict() for path, s in model.sites.items()}
        impls = {path: s.impl for path, s in model.sites.items()}
        stamps = {path: s.stamp for path, s in model.sites.items()}
        old = list(model.route)
        model.set_route(entries)
        effects: dict[str, str] = {}
        held = debugger.held
        if held is not None and held.call.site.impl is not impls[held.call.site.path]:
            try:
                debugger.rerun_held()
            except (Exception, SystemExit) as error:
                model.route = old
                for path, changed_site in model.sites.items():
                    changed_site.put_back(impls[path], stamps[path])
                raise DSV4Error(
                    f"{held.call.site.path}: {entries[-1]} raised {type(error).__name__}: {error}",
                    "the route is as it was",
                ) from error
            effects[held.call.site.path] = held.effect
        changed = []
        for path, site in model.sites.items():
            same = site.impl is impls[path]
            if same and site not in asked:
                continue
            effect = effects.get(path, "")
            if same:
                note = f" ({site.stamp.note})" if site.stamp.note else ""
                effect = f"NO EFFECT: both are {site.stamp.implementation}{note}"
            after = site.stamp.to_dict()
            changed.append({"site": path, "before": before[path], "after": after, "effect": effect})
        return {
            "changed": changed,
            "route": [str(e) for e in model.route],
            "state": self.state(),
        }

    def do_faults(self, names: str = "") -> dict[str, Any]:
        """The catalogue of known bugs; from now on `route` completes their names."""
        import dsv4_bench.probes.faults.catalogue  # noqa: F401
        from dsv4_bench.probes.faults.base import select_faults

        rows = [
            {"name": f"fault/{f.name}", "ops": list(f.parts), "route": f.route, "what": f.doc}
            for f in select_faults(names.split())
        ]
        return {"faults": rows}

    def do_shadow(self, what: str = "") -> dict[str, Any]:
        debugger, shadow = self.debugger, self.debugger.shadow
        if what in ("off", "none"):
            shadow.pattern = ""
        elif what in ("", "on", "all"):
            shadow.pattern = "*" if what or not shadow.pattern else ""
        else:
            self._sites(what)
            shadow.pattern = what
        debugger.look_again()
        return self.state()

    def do_carried(self, what: str = "") -> dict[str, Any]:
        """Compare with a reference run from the first token on; it catches up here and now."""
        debugger, shadow = self.debugger, self.debugger.shadow
        if what not in ("", "on", "off"):
            raise DSV4Error(f"carried: {what!r} is neither on nor off")
        shadow.carried = what == "on" or (not what and not shadow.carried)
        debugger.look_again()
        return self.state()

    def do_probes(self, names: str = "") -> dict[str, Any]:
        if names:
            wanted = [] if names == "none" else names.replace(",", " ").split()
            chosen = make_probes(wanted)
            old = {probe.name: probe for probe in self.debugger.probes}
            self.debugger.probes = [old.get(probe.name, probe) for probe in chosen]
            self.debugger.look_again()
        make_probes([])  # registers the built-in ones
        graph = {False: "", True: " (in CUDA graphs too)"}
        known = {name: cls.help + graph[cls.captures] for name, cls in PROBES.items()}
        return {**self.state(), "known_probes": known}

    # -- breakpoints

    def do_break(self, condition: str = "") -> dict[str, Any]:
        debugger = self.debugger
        text = condition or debugger.site
        if not text:
            raise DSV4Error("no site to break at", "give one, e.g. `break */attn/core`")
        number = max((b.number for b in debugger.breaks), default=0) + 1
        point = self._parse_break(number, text)
        existing = next((b for b in debugger.breaks if b.text == point.text), None)
        if existing is not None:  # pressing the key again takes it away
            debugger.breaks.remove(existing)
            return {**self.do_breaks(), "text": f"breakpoint {existing.number} deleted"}
        debugger.breaks.append(point)
        note = self._enable_for(point.name, point.pattern)
        return {**self.do_breaks(), "text": f"breakpoint {number}: {point.text}{note}"}

    def _parse_break(self, number: int, text: str) -> Breakpoint:
        """Raises DSV4Error for a site or a reading that does not exist."""
        debugger = self.debugger
        make_probes([])
        known = {name for cls in PROBES.values() for name in cls.reads} | {"own_error"}
        known |= {reading.name for reading in debugger.readings.values()}
        point = parse_breakpoint(number, text, sorted(known))
        select_sites(debugger.model.sites.values(), point.pattern)
        return point

    def restore_breaks(self, saved: list[dict[str, Any]]) -> None:
        """The breakpoints of a worker before this one, with their numbers and hits."""
        for row in saved:
            point = self._parse_break(int(row["number"]), str(row["text"]))
            self.debugger.breaks.append(point.again(point.number, int(row["hits"])))

    def _enable_for(self, name: str, pattern: str) -> str:
        """Turn on the probe, or the shadow, that takes the reading a breakpoint asks for."""
        debugger = self.debugger
        if name == "own_error" and not debugger.shadow.pattern:
            debugger.shadow.pattern = pattern
            return f" (shadow on for {pattern})"
        needed = probe_that_reads(name) if name else None
        if needed and needed not in [probe.name for probe in debugger.probes]:
            debugger.probes += make_probes([needed])
            return f" (probe {needed} on)"
        return ""

    def do_breaks(self) -> dict[str, Any]:
        return {"breaks": [point.to_dict() for point in self.debugger.breaks]}

    def do_delete(self, number: int) -> dict[str, Any]:
        kept = [b for b in self.debugger.breaks if b.number != number]
        if len(kept) == len(self.debugger.breaks):
            numbers = ", ".join(str(b.number) for b in self.debugger.breaks) or "none"
            raise DSV4Error(f"no breakpoint {number}", f"breakpoints: {numbers}")
        self.debugger.breaks = kept
        return {**self.do_breaks(), "text": f"breakpoint {number} deleted"}

    # -- look

    def do_status(self) -> dict[str, Any]:
        return self.state()

    def do_op(self, site: str = "") -> dict[str, Any]:
        path = site or self.debugger.site
        if not path:
            raise DSV4Error("no op has run yet", "give a site, or `step`")
        if path not in self.debugger.model.sites:
            hint = did_you_mean(path, self.debugger.model.sites)
            raise DSV4Error(f"no site {path!r}", hint)
        return views.op_view(self.debugger, path)

    def do_heatmap(self, request: str = "") -> dict[str, Any]:
        return heat_view(self.debugger, request)

    def do_bundle(self, out: str, sites: str = "*") -> dict[str, Any]:
        """The current layer as a bundle; its parts are imported when they are needed."""
        from dsv4_bench.workbench.bundle_here import write_bundle_here

        command = ["dsv4-bench", "tui", f"bundle {out} {sites}"]
        written = write_bundle_here(self.debugger, Path(out), sites, self.layout, command)
        first = f"; first over its limit: {written.first['sentence']}" if written.first else ""
        text = f"wrote {written.path}: {written.calls} ops, {written.bytes / 1e6:.1f} MB"
        text += f", {len(written.left_out)} left out" if written.left_out else ""
        return {**written.to_dict(), "text": text + first}

    def do_timing(self, site: str = "*") -> dict[str, Any]:
        from dsv4_bench.workbench.timing_here import time_here

        return time_here(self.debugger, site)

    def do_ncu(self, site: str = "") -> dict[str, Any]:
        from dsv4_bench.workbench.counting_here import count_here

        path = site or self.debugger.site or ""
        if path and path not in self.debugger.model.sites:
            raise DSV4Error(f"no site {path!r}", did_you_mean(path, self.debugger.model.sites))
        return count_here(self.debugger, path, self.reloader.plugins)

    def do_history(self, site: str = "") -> dict[str, Any]:
        from dsv4_bench.workbench.timing import history

        pattern = site or self.debugger.site
        if not pattern:
            raise DSV4Error("no op has run yet", "give a site, or `step`")
        self._sites(pattern)
        rows = history.rows(pattern)
        here = os.getpid()
        return {
            "pattern": pattern,
            "rows": [{**row, "here": row["process"] == here} for row in rows],
        }

    def do_compare(self, a: str, b: str) -> dict[str, Any]:
        from dsv4_bench.workbench.comparing import Comparing

        def progress(text: str, done: int, total: int) -> None:
            if self.debugger.pause:
                raise DSV4Error(f"compare: paused at op {done} of {total}")

        self.comparing = Comparing(a, b, progress)
        return self.comparing.to_dict()

    def do_difference(self, request: str) -> dict[str, Any]:
        if self.comparing is None:
            raise DSV4Error("nothing is compared", "`compare A B` first")
        number, _, rest = request.partition(" ")
        if not number.isdigit():
            raise DSV4Error(f"difference: {number!r} is not the number of an op")
        return self.comparing.difference(int(number), parse_request(rest))

    def do_sites(self) -> dict[str, Any]:
        return {"sites": views.sites_view(self.debugger)}

    def do_readings(self, site: str = "", probe: str = "") -> dict[str, Any]:
        if site and site in PROBES and not probe:
            site, probe = "*", site
        rows = [
            reading.to_dict()
            for reading in self.debugger.readings.values()
            if matches(reading.site, site or "*") and probe in ("", reading.probe)
        ]
        order = {path: i for i, path in enumerate(self.debugger.model.sites)}
        rows.sort(key=lambda row: order.get(row["site"], -1))
        return {"readings": rows}

    def do_honesty(self) -> dict[str, Any]:
        """Runs the prompt three times on caches of its own; the session stays where it is."""
        debugger = self.debugger
        spans = [span for span in debugger.plan.spans() if span[1] <= len(debugger.tokens)]
        pieces = [debugger.tokens[start:stop] for start, stop in spans]
        probes = make_probes([probe.name for probe in debugger.probes])
        found = measure(debugger.model, pieces, probes)
        return {**found.to_dict(), "text": found.sentence}

    def do_stamps(self) -> dict[str, Any]:
        sites = self.debugger.model.sites.values()
        return {"stamps": [{"site": s.path, "op": s.op, **s.stamp.to_dict()} for s in sites]}

    def do_print(self, expression: str) -> dict[str, Any]:
        return self._evaluate(expression)

    def do_eval(self, expression: str) -> dict[str, Any]:
        return self._evaluate(expression)

    def do_watch(self, expression: str = "") -> dict[str, Any]:
        if expression in self.watches:
            self.watches.remove(expression)
        elif expression:
            self.watches.append(expression)
        return {"watches": self._watch_values()}

    def _watch_values(self) -> list[dict[str, Any]]:
        rows = []
        for expression in self.watches:
            try:
                rows.append({"expression": expression, "text": self._evaluate(expression)["text"]})
            except DSV4Error as error:
                rows.append({"expression": expression, "error": error.message})
        return rows

    def _evaluate(self, expression: str) -> dict[str, Any]:
        """A Python expression over the held op's tensors; the user's own, on the user's machine."""
        held = self.debugger.held
        if held is None:
            raise DSV4Error("no op is held", "`step` to one first")
        names = {**held.call.inputs, **held.call.outputs}
        try:
            value = eval(expression, {"torch": torch, "F": F, **names})
            with _print_options():
                result: dict[str, Any] = {
                    "expression": expression,
                    "text": str(value)[:_TEXT_LIMIT],
                }
        except (Exception, SystemExit) as error:
            raise DSV4Error(
                f"{expression}: {type(error).__name__}: {error}", f"names: {', '.join(names)}"
            ) from None
        if isinstance(value, torch.Tensor):
            result["shape"] = list(value.shape)
            result["dtype"] = str(value.dtype).removeprefix("torch.")
        return result


class _print_options:
    """Shorter tensors than torch prints by default."""

    def __enter__(self) -> None:
        torch.set_printoptions(**_PRINT)  # type: ignore[arg-type]

    def __exit__(self, *exception: object) -> None:
        torch.set_printoptions(profile="default")
