"""Inside the worker: opens what the client asked for, and answers its commands."""

from __future__ import annotations

import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.probes.base import make_probes
from dsv4_bench.workbench.asking import Plan, Quit, Request, Restart, Rewind
from dsv4_bench.workbench.commands import BY_NAME, Parsed
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.engine_commands import EngineCommands
from dsv4_bench.workbench.loading import load_model, prompt_tokens
from dsv4_bench.workbench.protocol import SCHEMA_VERSION
from dsv4_bench.workbench.snapshots import SnapshotStore

# Looking changes nothing, so it is answered without a `state` event (a watch is part of the state).
_QUIET = {name for name, command in BY_NAME.items() if command.group == "Look"} - {"watch"}


class SessionServer:
    """One session. `send` puts a message on the wire; `submit` may be called before `open` is done."""

    def __init__(self, folder: Path, send: Callable[[dict[str, Any]], None]) -> None:
        self.folder = folder
        self.send = send
        self.requests: queue.Queue[Request | None] = queue.Queue()
        self.debugger: Debugger
        self._pausable: Debugger | None = None
        self._pending: tuple[Request, float] | None = None

    def open(self, options: dict[str, Any]) -> None:
        """Open the checkpoint and restore what a worker before this one left. Raises DSV4Error."""
        self.loaded = load_model(options)
        model = self.loaded.model
        ids = prompt_tokens(self.loaded, options.get("prompt"), options.get("tokens"))
        chunks = tuple(options.get("chunks", ()))
        plan = Plan(tuple(ids), chunks, options.get("max_new_tokens", 0))
        store = SnapshotStore(self.folder)
        self.debugger = Debugger(model, plan, self.send, store)
        self.debugger.requests = self.requests
        plugins = options.get("plugins", [])
        loaded = self.loaded
        self.commands = EngineCommands(self.debugger, loaded.tokenizer, plugins, loaded.layout)
        self.debugger.handle = self._handle
        self.debugger.on_stop = self._on_stop
        self.debugger.probes = make_probes(options.get("probes", []))
        if options.get("shadow"):
            self.commands.do_shadow(options["shadow"])
        self.debugger.shadow.carried = options.get("carried", False)
        resume = store.load(self.debugger.cache) if options.get("resume") else None
        if resume is not None:
            self.debugger.resume(resume)
        self.commands.restore_breaks(options.get("breaks", []))
        self.commands.watches = list(options.get("watches", []))
        self._pausable = self.debugger

    def hello(self) -> dict[str, Any]:
        """What a client needs to know once."""
        model, checkpoint = self.loaded.model, self.loaded.model.checkpoint
        kinds = [model.config.attention_kind(i) for i in range(model.config.num_hidden_layers)]
        return {
            "event": "hello",
            "schema_version": SCHEMA_VERSION,
            "pid": os.getpid(),
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
            "implementations": {op: list(table) for op, table in IMPLEMENTATIONS.items()},
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
        """Called by the reader thread: everything waits its turn, only `pause` acts at once."""
        command = parsed.command
        if command.where == "client":
            text = f"{command.name}: done by the client, not by the worker"
            self.reply_error(number, DSV4Error(text))
            return
        if command.name == "pause":
            self._pause()
        self.requests.put(Request(number, command.name, dict(parsed.arguments)))

    def _pause(self) -> None:
        """Stop the engine at the next op, and drop what was typed ahead to run after it."""
        if self._pausable is not None:
            self._pausable.pause = True
        waiting = []
        while True:
            try:
                waiting.append(self.requests.get_nowait())
            except queue.Empty:
                break
        for request in waiting:
            if request is not None and BY_NAME[request.name].runs:
                self.reply_error(request.id, DSV4Error(f"{request.name}: dropped by `pause`"))
            else:
                self.requests.put(request)

    def reply_error(self, number: int, error: DSV4Error) -> None:
        self.send({"event": "reply", "id": number, "ok": False, "error": error.to_dict()})

    def reply(self, number: int, result: dict[str, Any]) -> None:
        self.send({"event": "reply", "id": number, "ok": True, "result": result})

    def _handle(self, request: Request) -> None:
        """Run one command on the engine thread. Rewind, Restart and Quit pass through."""
        handler = getattr(self.commands, f"do_{request.name}")
        self._pending = (request, time.perf_counter())
        try:
            result = handler(**request.arguments)
        except (Rewind, Restart):  # answered at the next stop
            self._start_running()
            raise
        except (Quit, BrokenPipeError):
            raise
        except Exception as error:
            self._pending = None
            self.reply_error(request.id, _as_error(request, error))
            return
        if self.debugger.goal is not None:
            self._start_running()
            return
        self._pending = None
        nothing_new = request.name == "reload" and result is not None and not result["reloaded"]
        if request.name not in _QUIET and not nothing_new:
            self._send_state(self.commands.state())
        self.reply(request.id, result)

    def _start_running(self) -> None:
        self.debugger.state = "running"
        self._send_state(self.commands.state())

    def _on_stop(self) -> None:
        """Tell the client where the engine stands; the state first, so that a reply finds it known."""
        state = self.commands.state()
        pending, self._pending = self._pending, None
        if pending is not None:
            state["seconds"] = time.perf_counter() - pending[1]
        self._send_state(state)
        if pending is not None:
            self.reply(pending[0].id, state)

    def _send_state(self, state: dict[str, Any]) -> None:
        self.send({"event": "state", **state})


def _as_error(request: Request, error: Exception) -> DSV4Error:
    """The error a client gets; what is no DSV4Error is our own fault, and goes to the log too."""
    if isinstance(error, DSV4Error):
        return error
    traceback.print_exc()
    text = f"{request.name}: internal: {type(error).__name__}: {error}"
    return DSV4Error(text, "the session goes on; please report it", ExitCode.CRASHED)
