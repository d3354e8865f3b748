"""A scripted session: speaks the events and replies of the real one, computes nothing, has no clock.

`FakeSession.die(...)`, `FakeSession.slow` (run commands stay running until `release()`), and
`lines` (everything that was sent) are for tests. Run this file to look at the UI by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import parse

Event = dict[str, Any]
KINDS = {0: "SWA", 4: "CSA", 128: "HCA"}
COMPRESSOR = ("wkv", "wgate", "pool", "norm", "rope", "write")
QUERY = ("hc_pre", "norm", "wq_a", "q_norm", "wq_b", "q_head_norm", "q_rope")
OPS = {"core": "attention", "topk": "index_topk", "experts": "experts", "gate": "gate"}


def site_entries(layers: int) -> list[Event]:
    entries: list[Event] = [{"path": "embed", "op": "embed", "layer": None, "kind": None}]
    for layer in range(layers):
        kind = "SWA" if layer < 2 else "CSA" if layer % 2 == 0 else "HCA"
        names = [f"attn/{name}" for name in (*QUERY, "wkv", "kv_norm", "kv_rope")]
        if kind != "SWA":
            names += [f"attn/compressor/{name}" for name in COMPRESSOR]
        if kind == "CSA":
            names += [f"attn/index/compressor/{name}" for name in COMPRESSOR]
            names += [
                f"attn/index/{name}" for name in ["wq_b", "rope", "weights_proj", "score", "topk"]
            ]
        names += [
            f"attn/{name}"
            for name in ["gather_swa", "window_write", "core", "o_rope", "wo_a", "wo_b", "hc_post"]
        ]
        names += [
            f"ffn/{name}"
            for name in ["hc_pre", "norm", "gate", "experts", "shared", "sum", "hc_post"]
        ]
        for name in names:
            leaf = name.rpartition("/")[2]
            op = OPS.get(leaf, "linear" if leaf.startswith("w") else leaf)
            entries.append({"path": f"L{layer}/{name}", "op": op, "layer": layer, "kind": kind})
    for name in ("hc_head", "norm", "logits"):
        entries.append({"path": f"head/{name}", "op": name, "layer": None, "kind": None})
    return entries


def tensor(name: str, shape: list[int], nan: int = 0, **more: Any) -> Event:
    count = math.prod(shape)
    stats = {
        "finite": count - nan,
        "nan": nan,
        "inf": 0,
        "abs_max": 4.21,
        "rms": 0.998,
        "mean": 1e-3,
    }
    return {
        "name": name, "shape": shape, "dtype": "float32", "device": "cpu", "bytes": count * 4,
        "stats": stats, "format": None, "expected_nonfinite": False, **more,
    }  # fmt: skip


class FakeSession:
    def __init__(self, on_event: Callable[[Event], None], layers: int = 16, opened: bool = True):
        self.on_event = on_event
        self.entries = site_entries(layers)
        self.layers = layers
        self.paths = [entry["path"] for entry in self.entries]
        self.lines: list[str] = []
        self.commands: list[str] = []
        self.closed = False
        self.slow = False
        self.slow_reply = False  # long commands are answered by `finish_reply`
        self.position = -1
        self.forward = 0
        self.breaks: list[Event] = []
        self.watches: list[str] = []
        self.shadow = "off"
        self.carried = False
        self.reference: set[str] = set()
        self.stuck: set[str] = set()  # sites whose route cannot be changed
        self.alarms: dict[str, str] = {}
        self.gpu = False
        self.sources: list[Any] = ["/kernels/core.cpp", "/kernels/abi.h"]
        self.edits: list[Event] = []  # what the next reloads find
        self.attempts: list[Event] = []
        self.state = "opening"
        self._number = 0
        self._held: tuple[int, str, Event] | None = None
        if opened:
            self.open()

    # -- for tests

    def open(self) -> None:
        self.state = "ready"
        self.on_event({
            "event": "hello", "schema_version": 1, "pid": 123, "checkpoint": "checkpoints/demo",
            "layout": "modelopt nvfp4", "config": {}, "device": "cpu", "dtype": "float32",
            "sites": self.entries, "tokens": list(range(128)), "threads": 2,
            "text": "The quick brown fox",
            "implementations": {entry["op"]: ["reference", "cpu"] for entry in self.entries},
        })  # fmt: skip
        self._emit_state()

    def die(self, site: str | None = None, signal: str | None = "SIGSEGV") -> None:
        self.state = "dead"
        self.on_event({
            "event": "died", "site": site or self._site(), "signal": signal, "returncode": -11,
            "stderr": ["attention_avx2: kv row 4096 of 4096", "Segmentation fault"],
            "message": "the worker crashed inside a kernel",
        })  # fmt: skip
        self._emit_state()

    def release(self) -> None:
        """Let a slow run command end."""
        assert self._held is not None
        (number, line, result), self._held = self._held, None
        self._settle(number, line, result)

    def finish_reply(self) -> None:
        """Answer the long command that waits."""
        line, result, number = self._late
        self._reply(line, result, number=number)

    def log(self, stream: str, text: str) -> None:
        self.on_event({"event": "log", "stream": stream, "text": text})

    # -- the session's interface

    def send(self, line: str, log: bool = True) -> int:
        self._number += 1
        self.lines.append(line)
        if self.state == "dead" and not line.startswith("restart"):
            self._reply(line, error=DSV4Error("the worker is gone", "restart starts a new one"))
            return self._number
        try:
            parsed = parse(line)
            handler = getattr(self, f"_do_{parsed.command.name}", None)
            result = handler(**parsed.arguments) if handler else {}
        except DSV4Error as error:
            self._reply(line, error=error)
            return self._number
        if parsed.command.long and self.slow_reply:
            self._late = (line, result, self._number)
        elif parsed.command.runs:
            self._run(line, result)
        else:
            self._reply(line, result)
            self._emit_state()
        return self._number

    def close(self) -> None:
        self.closed = True

    # -- how a run unfolds

    def _run(self, line: str, target: int) -> None:
        self.state = "running"
        self._emit_state()
        if self.slow:
            self._held = (self._number, line, {"target": target})
            self.on_event({"event": "enter", "site": self.paths[min(self.position + 1, target)]})
            return
        self._settle(self._number, line, {"target": target})

    def _settle(self, number: int, line: str, result: Event) -> None:
        target = result["target"]
        for index in range(self.position + 1, target + 1):
            path = self.paths[index]
            self.on_event({"event": "enter", "site": path})
            self.on_event(self._site_event(index, path))
        self.position = target
        self.state = "finished" if target == len(self.paths) - 1 else "stopped"
        self._emit_state()
        self._reply(line, self._status(), number=number)

    def _site_event(self, index: int, path: str) -> Event:
        return {
            "event": "site", "site": path, "seconds": self._seconds(index),
            "route": self._route(path), **self._errors(index, path),
        }  # fmt: skip

    def _errors(self, index: int, path: str) -> Event:
        """Errors and alarm of a site that ran: a site whose alarm names own_error is over its limit."""
        alarm = self.alarms.get(path, "")
        over = "own_error" in alarm
        own = (0.31 if over else 1e-7 * (1 + index % 7)) if self.shadow != "off" else None
        carried = 1e-6 * (1 + index // 40) if self.carried else None
        kind = "over" if over else "nonfinite" if "NaN" in alarm else "broken" if alarm else ""
        return {
            "own_error": own, "times": None if own is None else own / 2e-6, "alarm": alarm,
            "anomaly": kind, "carried_error": carried,
        }  # fmt: skip

    def _seconds(self, index: int) -> float:
        return 1e-5 * (1 + index * 37 % 113)

    def _route(self, path: str) -> str:
        return "reference" if path in self.reference else "cpu"

    def _site(self) -> str | None:
        return self.paths[self.position] if self.position >= 0 else None

    def _status(self) -> Event:
        site = self._site()
        entry = self.entries[max(self.position, 0)]
        return {
            "state": self.state, "site": site, "op": entry["op"] if site else None,
            "layer": entry["layer"] if site else None, "index": self.position,
            "of": len(self.paths), "forward": self.forward, "forwards": 5, "phase": "prefill",
            "tokens": [0, 128], "why": "step", "seconds": 0.0123, "route": ["kernel"],
            "shadow": self.shadow, "carried": self.carried,
            "calibration": {"ops": 17, "calls": 68, "seconds": 1.8 if self.shadow != "off" else 0.0},
            "probes": ["stats", "residual"], "breaks": list(self.breaks),
            "generated": [], "text": "", "top": [], "watches": self._watch_values(), "memory": {"rss": 734003200},
        }  # fmt: skip

    def _emit_state(self) -> None:
        self.on_event({"event": "state", **self._status()})

    def _reply(
        self, line: str, result: Any = None, error: DSV4Error | None = None, number: int = 0
    ) -> None:
        event: Event = {"event": "reply", "id": number or self._number, "line": line}
        event |= (
            {"ok": False, "error": error.to_dict()} if error else {"ok": True, "result": result}
        )
        self.on_event(event)

    # -- commands: those that run return the index of the site to stop after

    def _do_step(self, n: int = 1) -> int:
        return min(self.position + n, len(self.paths) - 1)

    _do_next = _do_step

    def _do_finish(self) -> int:
        group = self.paths[min(self.position + 1, len(self.paths) - 1)].rpartition("/")[0]
        inside = [i for i, path in enumerate(self.paths) if path.startswith(group + "/")]
        return max(inside, default=self._do_step())

    def _do_layer(self, n: int = 1) -> int:
        top = self.paths[min(self.position + 1, len(self.paths) - 1)].partition("/")[0]
        return max(i for i, path in enumerate(self.paths) if path.partition("/")[0] == top)

    def _do_continue(self) -> int:
        stops = {entry["text"] for entry in self.breaks}
        for index in range(self.position + 1, len(self.paths)):
            if self.paths[index] in stops:
                return index
        return len(self.paths) - 1

    def _do_until(self, site: str) -> int:
        if site not in self.paths:
            raise DSV4Error(f"no site matches {site!r}", "sites lists them")
        return self.paths.index(site)

    def _do_back(self, n: int = 1) -> int:
        return max(0, self.position - n)

    def _do_rerun(self) -> int:
        return self.position

    def _do_goto(self, layer: int) -> int:
        if not 0 <= layer < self.layers:
            raise DSV4Error(f"goto: no layer {layer}", f"layers are 0 to {self.layers - 1}")
        return self.paths.index(f"L{layer}/ffn/hc_post")

    def _do_pause(self) -> Event:
        return {}

    def _do_status(self) -> Event:
        return self._status()

    def _do_restart(self) -> Event:
        self.position = -1
        self.open()
        return self._status()

    def _do_shadow(self, what: str = "on") -> Event:
        self.shadow = {"on": "*"}.get(what, what)
        self._emit_state()
        return self._status()

    def _do_carried(self, what: str = "on") -> Event:
        self.carried = what == "on"
        self._emit_state()
        return self._status()

    def _do_anomaly(self) -> int:
        ahead = [
            i for i in range(self.position + 1, len(self.paths)) if self.paths[i] in self.alarms
        ]
        return min(ahead, default=len(self.paths) - 1)

    def _do_faults(self, names: str = "") -> Event:
        row = {
            "name": "fault/comb_transposed", "ops": ["hc_post"],
            "route": ["L2/attn/hc_post=fault/comb_transposed"],
            "what": "The mixing sum runs over comb's second index.",
        }  # fmt: skip
        return {"faults": [row]}

    def _do_toggle(self, site: str | None = None) -> Event:
        path = site or self._site() or self.paths[0]
        before = self._route(path)
        self.reference ^= set() if path in self.stuck else {path}
        changed = {
            "site": path, "before": {"implementation": before, "hash": "a1b2"},
            "after": {"implementation": self._route(path), "hash": "c3d4"},
            "effect": "NO EFFECT: both are cpu" if path in self.stuck else "",
        }  # fmt: skip
        return {"changed": [changed], "route": ["kernel"], "state": self._status()}

    def _do_break(self, condition: str = "") -> Event:
        number = max((entry["number"] for entry in self.breaks), default=0) + 1
        self.breaks.append({"number": number, "text": condition, "hits": 0})
        self._emit_state()
        return {"breaks": list(self.breaks), "text": f"breakpoint {number}: {condition}"}

    def _do_breaks(self) -> Event:
        return {"breaks": list(self.breaks)}

    def _do_delete(self, number: int) -> Event:
        self.breaks = [entry for entry in self.breaks if entry["number"] != number]
        self._emit_state()
        return {"breaks": list(self.breaks)}

    def _do_print(self, expression: str) -> Event:
        if expression.startswith("missing"):
            raise DSV4Error("print: no tensor 'missing' here", "here: q, window, o")
        text = "tensor([[ 0.1212, -0.4410,  1.0021],\n        [ 0.3321,  0.0000, -2.1200]])"
        return {"expression": expression, "text": text, "shape": [2, 3], "dtype": "float32"}

    _do_eval = _do_print

    def _do_watch(self, expression: str = "") -> Event:
        self.watches += [expression] if expression else []
        return {"watches": self._watch_values()}

    def _watch_values(self) -> list[Event]:
        return [{"expression": e, "text": "tensor(1.0021)"} for e in self.watches]

    def _do_heatmap(self, request: str = "") -> Event:
        """A ridge along the diagonal of [128, 8, 512], one cell not finite."""
        if self.position < 0:
            raise DSV4Error("no op is held", "`step` to one first")
        words = [word.partition("=") for word in request.split()]
        given = {name: value for name, equals, value in words if equals}
        output = next((name for name, equals, _ in words if not equals), "o")
        height, width = (int(n) for n in given.get("cells", "16x64").split("x"))
        top, bottom = (int(n) for n in given.get("rows", "0:128").split(":"))
        left, right = (int(n) for n in given.get("columns", "0:4096").split(":"))
        high, wide = -(-(bottom - top) // height), -(-(right - left) // width)
        rows, columns = range(top, bottom, high), range(left, right, wide)
        distance = [[abs(r / 128 - c / 4096) for c in columns] for r in rows]
        error: list[list[Any]] = [
            [10 ** (-1 - 8 * d) if d < 0.5 else 0 for d in row] for row in distance
        ]
        if (top, left) == (0, 0):
            error[0][0] = "inf"
        return {
            "shape": [128, 8, 512], "block": (high, wide), "rms": 0.9, "error": error,
            "area": {"top": top, "bottom": bottom, "left": left, "right": right},
            "at": [[(r, c) for c in columns] for r in rows],
            "ours": [[1.25 for _ in columns] for _ in rows],
            "theirs": [[1.2500012 for _ in columns] for _ in rows],
            "site": self._site(), "output": output, "outputs": ["o", "lse"],
            "route": "cpu", "against": "reference",
        }  # fmt: skip

    def _do_bundle(self, out: str, sites: str = "*") -> Event:
        return {
            "bundle": out,
            "bytes": 1_300_000,
            "calls": 41,
            "text": f"wrote {out}: 41 ops, 1.3 MB",
        }

    def _do_timing(self, site: str = "*") -> Event:
        """The ops of the current layer; the fourth has no kernel, `core` is wrong and slow."""
        group = (self._site() or "embed").partition("/")[0]
        rows = []
        for number, path in enumerate(p for p in self.paths if p.partition("/")[0] == group):
            core = path.endswith("core")
            kernel, seconds = (
                "reference" if number == 3 else "cpu",
                1e-3 if core else 1e-5 * (number + 1),
            )
            rows.append({
                "site": path, "op": "x", "layer": 2, "kernel": kernel, "floor": 2e-6, "note": "",
                "seconds": {kernel: seconds, "reference": seconds if number == 3 else 4 * seconds},
                "own_error": None if number == 3 else 0.5 if core else 1e-7, "limit": 1e-6,
                "verdict": "" if number == 3 else "over" if core else "ok", "bytes": 1, "flops": 1,
                "of_floor": 2e-6 / seconds, "speedup": None if number == 3 else 4.0,
            })  # fmt: skip
        return {"group": group, "kind": "CSA", "tokens": [0, 128], "device": "cpu", "sites": rows}

    def _do_history(self, site: str | None = None) -> Event:
        """Three runs today, one of another day on another machine; the newest is a tenth faster."""
        rows = []
        for number, (seconds, what, verdict) in enumerate(
            ((9e-6, "watch", "ok"), (None, "watch", ""), (1e-5, "timing", "over"), (1e-5, "profile", "ok"),
             (5e-6, "profile", "ok"))
        ):  # fmt: skip
            failed = seconds is None
            rows.append({
                "when": f"2026-11-{23 - number // 4}T08:{30 - number}:00+00:00", "what": what,
                "checkpoint": "demo", "device": "NVIDIA H200" if number == 4 else "AMD EPYC",
                "conditions": "decode, 1 x 160 tokens, float32", "process": number // 2,
                "site": site or self._site(), "implementation": "cpu", "hash": "" if failed else f"a{number}b2c3d4",
                "seconds": seconds, "own_error": None if failed else 1e-6 if verdict == "over" else 1e-8,
                "limit": None if failed else 1e-7, "verdict": verdict,
                "problem": "hyper.cpp:3: error: expected ';'" if failed else "", "here": number < 2,
            })  # fmt: skip
        return {"pattern": site or self._site(), "rows": rows}

    def _do_ncu(self, site: str | None = None) -> Event:
        if not self.gpu:
            hint = (
                f"with a GPU and ncu: dsv4-bench profile demo --sites {site} --ncu --phase decode"
            )
            raise DSV4Error("ncu: this session runs on the CPU", hint)
        kernel = {
            "site": site, "kernel": "void dsv4::attention_kernel<float>", "seconds": 2.4e-5, "cold": 2.5e-5,
            "dram": 71.0, "compute": 12.5, "occupancy": 33.0, "registers": 168.0,
            "dram_bytes": 8e7, "stalls": {"long_scoreboard": 9.25, "barrier": 0.5},
        }  # fmt: skip
        return {"site": site, "kernels": [kernel]}

    def _do_sources(self, site: str | None = None) -> Event:
        reference = self._route(str(site)) == "reference"
        files = [] if reference else [str(file) for file in self.sources]
        return {"site": site, "implementation": self._route(str(site)), "files": files}

    def _do_reload(self) -> Event:
        """An attempt whenever `edits` has another one to give."""
        changed = bool(self.edits)
        if changed:
            made = {"site": self._site(), "implementation": "cpu", "error": "", "took": 1.4}
            self.attempts.append(made | self.edits.pop(0))
        return {
            "reloaded": changed, "site": self._site(), "files": [str(file) for file in self.sources],
            "history": list(self.attempts),
        }  # fmt: skip

    def _do_compare(self, a: str, b: str) -> Event:
        """Every tenth op differs; from L2/attn/core on what differs is carried or within."""
        ops = []
        for index, path in enumerate(self.paths[:200]):
            blame = "here" if path == "L2/attn/core" else "equal"
            if index % 10 == 0:
                blame = "carried" if index > self.paths.index("L2/attn/core") else "within"
            size = {"here": 0.5, "carried": 0.1, "within": 1e-7, "equal": 0.0}[blame]
            ops.append({
                "site": path, "op": "x", "forward": 0, "a": "reference", "b": "cpu", "blame": blame,
                "input_error": size if blame == "carried" else 0.0, "output_error": size,
                "limit": 3e-7, "output": "o", "sentence": f"{path} #0: o differs by {size}",
            })  # fmt: skip
        first = next(op for op in ops if op["blame"] == "here")
        return {
            "status": "different", "sentence": first["sentence"], "first": first, "bitwise": False,
            "around": ["torch: 2.12 / 2.13"], "ops": ops, "a": a, "b": b,
        }  # fmt: skip

    def _do_difference(self, request: str) -> Event:
        number, _, rest = request.partition(" ")
        position, self.position = self.position, int(number)
        heat = {**self._do_heatmap(rest), "route": "B cpu", "against": "A reference"}
        self.position = position
        return heat

    def _do_sites(self) -> Event:
        stops = {entry["text"] for entry in self.breaks}
        return {"sites": [self._site_row(i, e, stops) for i, e in enumerate(self.entries)]}

    def _site_row(self, index: int, entry: Event, stops: set[str]) -> Event:
        state = "done" if index < self.position else "pending"
        path, ran = entry["path"], index <= self.position
        return {
            "path": path, "op": entry["op"], "layer": entry["layer"], "route": self._route(path),
            "note": "", "state": "current" if index == self.position else state,
            "seconds": self._seconds(index) if ran else None,
            "break": path in stops, **(self._errors(index, path) if ran else {}),
        }  # fmt: skip

    def _do_op(self, site: str | None = None) -> Event:
        path = site or self._site()
        if path not in self.paths:
            raise DSV4Error(f"no site {path!r}")
        index = self.paths.index(path)
        held = index == self.position
        nan = 3 if path in self.alarms else 0
        view: Event = {
            "site": path, "op": self.entries[index]["op"], "layer": self.entries[index]["layer"],
            "doc": "Attention over window and selected entries.\n\nq [n, h, hd], window [n, w, hd].",
            "inputs": [], "params": [], "outputs": [], "route": self._route(path),
            "stamp": {"implementation": self._route(path), "hash": "a1b2c3d4e5", "launches": 1,
                      "note": ""},
            "alternatives": [
                {"name": "reference", "available": True, "reason": ""},
                {"name": "cpu", "available": True, "reason": ""},
                {"name": "sm90", "available": False, "reason": "needs sm_90, this is cpu"},
            ],
            "times": {"cpu": 0.00012, "reference": 0.0005}, "own_error": None, "effect": "",
            "readings": self._readings_at(path), "held": held,
            "state": "current" if held else "done" if index < self.position else "pending",
        }  # fmt: skip
        if held:
            view["inputs"] = [tensor("q", [128, 8, 512]), tensor("window", [256, 512])]
            view["outputs"] = [tensor("o", [128, 8, 512], nan)]
            view["params"] = [tensor("weight", [1024, 4096], format="nvfp4", stats=None)]
        if self.shadow != "off":
            over = "own_error" in self.alarms.get(path, "")
            view["own_error"] = {
                "against": "float64" if over else "reference", "output": "o", "bits_equal": False,
                "relative_l2": 0.31 if over else 1.2e-7, "max_abs": 1e-6, "limit": 2e-6,
                "coordinate": [0, 3, 17], "ours": 1.25, "theirs": 1.2500012,
                "times": 1.55e5 if over else 0.06, "verdict": "over" if over else "ok",
            }  # fmt: skip
            if over:
                detail = "o = 0.69 x reference for rows 0-7 of 128"
                view["signature"] = {"kind": "constant_factor", "detail": detail}
        if self.carried and index <= self.position:
            view["carried_error"] = self._errors(index, path)["carried_error"]
        return view

    def _readings_at(self, path: str) -> list[Event]:
        def reading(probe: str, name: str, value: Any, **more: Any) -> Event:
            layer = self.entries[self.paths.index(path)]["layer"]
            base = {"unit": "", "limit": None, "verdict": "ok", "forward": 0, "detail": ""}
            keys = {"site": path, "probe": probe, "name": name, "value": value, "layer": layer}
            return {**keys, **base, **more}

        leaf = path.rpartition("/")[2]
        if leaf == "core":
            return [
                reading("softmax", "sink_mass", 0.12),
                reading("softmax", "entropy", 3.4, unit="nat", verdict="info"),
                reading("softmax", "row_sum", 1.0000001, limit=1.001),
            ]
        if leaf == "hc_post":
            layer = int(path[1:].partition("/")[0])
            norm = 1.0 + 0.35 * layer + 0.4 * math.sin(layer * 1.7)
            return [
                reading("residual", "norm", [norm, norm * 0.8, norm * 0.9, norm * 0.7]),
                reading("residual", "growth", 1.03, unit="ratio"),
            ]
        if leaf == "gate":
            return [reading("load", "expert", [3, 9, 0, 12, 8], unit="tokens", verdict="info")]
        return []

    def _do_readings(self, site: str = "*", probe: str = "") -> Event:
        readings: list[Event] = []
        prefix = site.partition("*")[0]
        for path in self.paths[: self.position + 1]:
            if path.startswith(prefix) and (not site.endswith("hc_post") or "hc_post" in path):
                readings += [r for r in self._readings_at(path) if probe in ("", r["probe"])]
        return {"readings": readings}


if __name__ == "__main__":
    from dsv4_bench.workbench.tui.app import run_tui

    raise SystemExit(run_tui(None, FakeSession))  # type: ignore[arg-type]
