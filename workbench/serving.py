"""Inside the worker: opens what the client asked for, and answers its commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.base import make_probes
from dsv4_bench.workbench.commands import Parsed
from dsv4_bench.workbench.debugger import Debugger, Plan, Quit, Request, Restart, Rewind
from dsv4_bench.workbench.engine_commands import EngineCommands
from dsv4_bench.workbench.loading import load_model, prompt_tokens
from dsv4_bench.workbench.snapshots import SnapshotStore


class SessionServer:
    """One open session. `send` puts a message on the wire."""

    def __init__(
        self, options: dict[str, Any], folder: Path, send: Callable[[dict[str, Any]], None]
    ) -> None:
        self.send = send
        self.folder = folder
        self.loaded = load_model(options)
        model = self.loaded.model
        ids = prompt_tokens(self.loaded, options.get("prompt"), options.get("tokens"))
        chunks = tuple(options.get("chunks") or ())
        plan = Plan(tuple(ids), chunks, int(options.get("max_new_tokens") or 0))
        store = SnapshotStore(folder)
        self.debugger = Debugger(model, plan, send, store)
        self.commands = EngineCommands(self.debugger, self.loaded.tokenizer)
        self.debugger.handle = self._handle
        self.debugger.on_stop = self._on_stop
        self.debugger.probes = make_probes(options.get("probes") or [])
        if options.get("shadow"):
            self.commands.do_shadow(str(options["shadow"]))
        for text in options.get("breaks") or []:
            self.commands.do_break(str(text))
        for text in options.get("watches") or []:
            self.commands.do_watch(str(text))
        if options.get("resume"):
            resume = store.load(self.debugger.cache)
            if resume is not None:
                self.debugger.resume(resume)
        self._pending: tuple[Request, float] | None = None

    def hello(self, schema_version: int) -> dict[str, Any]:
        """What a client needs to know once."""
        model, checkpoint = self.loaded.model, self.loaded.model.checkpoint
        kinds = [model.config.attention_kind(i) for i in range(model.config.num_hidden_layers)]
        return {
            "event": "hello",
            "schema_version": schema_version,
            "checkpoint": str(checkpoint.folder),
            "layout": self.loaded.layout,
            "notes": [*checkpoint.notes, *self.loaded.notes],
            "config": model.config.to_json(),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "folder": str(self.folder),
            "tokens": list(self.debugger.plan.tokens),
            "text": self.commands.decode(list(self.debugger.plan.tokens)),
            "sites": [
                {
                    "path": site.path,
                    "op": site.op,
                    "layer": site.layer,
                    "kind": None if site.layer is None else kinds[site.layer],
                }
                for site in model.sites.values()
            ],
        }

    def run(self) -> None:
        self.debugger.run()

    # -- commands

    def submit(self, number: int, parsed: Parsed) -> None:
        """Called by the reader thread. `pause` acts now, the rest at the engine's next stop."""
        if parsed.command.name == "pause":
            self.debugger.pause = self.debugger.state == "running"
        request = Request(number, parsed.command.name, dict(parsed.arguments))
        if self.debugger.state == "running":
            if request.name not in ("pause", "quit"):
                busy = DSV4Error(f"{request.name}: the engine is running", "`pause` stops it")
                self.reply_error(number, busy)
                return
        self.debugger.requests.put(request)

    def reply_error(self, number: int, error: DSV4Error) -> None:
        self.send({"event": "reply", "id": number, "ok": False, "error": error.to_dict()})

    def _reply(self, number: int, result: dict[str, Any]) -> None:
        self.send({"event": "reply", "id": number, "ok": True, "result": result})

    def _handle(self, request: Request) -> None:
        """Run one command on the engine thread. Rewind, Restart and Quit pass through."""
        if request.name == "quit":
            self._reply(request.id, {})
            raise Quit
        handler = getattr(self.commands, f"do_{request.name}")
        self._pending = (request, time.perf_counter())
        try:
            result = handler(**request.arguments)
        except DSV4Error as error:
            self._pending = None
            self.reply_error(request.id, error)
            return
        except (Rewind, Restart):  # answered at the next stop
            self.debugger.state = "running"
            self._send_state()
            raise
        if self.debugger.goal is None:
            self._pending = None
            self._reply(request.id, result)
            self._send_state()
        else:
            self.debugger.state = "running"
            self._send_state()

    def _on_stop(self) -> None:
        state = self.commands.state()
        if self._pending is not None:
            request, started = self._pending
            self._pending = None
            state["seconds"] = time.perf_counter() - started
            self._reply(request.id, state)
        self.send({"event": "state", **state})

    def _send_state(self) -> None:
        self.send({"event": "state", **self.commands.state()})
