"""The line at the bottom: `:` takes session commands, `/` searches the tree."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input, Static

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.tui.completion import History, Names, common, complete, hint
from dsv4_bench.workbench.tui.results import error_text

SEARCH_HINT = "parts of a path, such as  12 topk;  up and down: other matches;  enter stays"


class CommandLine(Vertical):
    """Hidden until opened. A line that does not parse stays, with the error under it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", show=False),
        Binding("tab", "complete", "Complete", show=False, priority=True),
        Binding("up", "walk(-1)", "Earlier", show=False, priority=True),
        Binding("down", "walk(1)", "Later", show=False, priority=True),
    ]

    class Entered(Message):
        """A line that parses."""

        def __init__(self, line: str) -> None:
            super().__init__()
            self.line = line

    class Opened(Message):
        """Letters are text from now on."""

    class NamesFaults(Message):
        """A route is being typed that may name a fault: their names are wanted."""

    class Searched(Message):
        """Find `text`; `step` 0 from here, 1 the next match, -1 the one before."""

        def __init__(self, text: str, step: int = 0) -> None:
            super().__init__()
            self.text = text
            self.step = step

    class Closed(Message):
        """`kept` is False when escape ended a search."""

        def __init__(self, kept: bool) -> None:
            super().__init__()
            self.kept = kept

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self.history = History()
        self.names = Names()
        self._choices: list[str] = []
        self._searching = False
        self.input = Input(id="line", compact=True, select_on_focus=False)
        self._prompt = Static(":", id="prompt")
        self._help = Static(id="hint", markup=False)

    def compose(self) -> ComposeResult:
        yield self._help
        with Horizontal():
            yield self._prompt
            yield self.input

    def open(self, text: str = "", search: bool = False) -> None:
        self._searching = search
        self.display = True
        self.post_message(self.Opened())
        self._prompt.update("/" if search else ":")
        self._set(text)
        self.screen.set_focus(self.input)  # at once: the next key is text already

    def reopen(self, text: str, refusal: str) -> None:
        """Open with a line that cannot be sent now, and why."""
        self.open(text)
        self._hint(refusal, error=True)

    def found(self, path: str | None) -> None:
        """What a search led to."""
        self._hint(path or "no match", error=path is None)

    def _hint(self, text: str, error: bool = False) -> None:
        self._help.update(text)
        self._help.set_class(error, "-error")

    def action_close(self, kept: bool = False) -> None:
        self.display = False
        self.post_message(self.Closed(kept or not self._searching))

    def action_walk(self, step: int) -> None:
        if self._searching:
            self.post_message(self.Searched(self.input.value, step))
            return
        self._set(self.history.move(self.input.value, step))

    def action_complete(self) -> None:
        """Extend by what all choices share; when nothing is left to extend, cycle through them."""
        text = self.input.value
        if self._searching:
            return
        if text in self._choices and len(self._choices) > 1:
            choices = self._choices
            self._set(choices[(choices.index(text) + 1) % len(choices)])
            return
        choices = complete(text, self.names)
        shared = common(choices)
        if len(shared) > len(text):
            self._set(shared)
        elif choices:
            self._choices = choices
            self._set(choices[0])
        if len(choices) > 1:
            self._hint("  ".join(choice.strip().rpartition(" ")[2] for choice in choices[:40]))

    def _set(self, text: str) -> None:
        with self.input.prevent(Input.Changed):
            self.input.value = text
        self.input.cursor_position = len(text)
        self._hint(SEARCH_HINT if self._searching else hint(text))

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        self._choices = []
        if not self.display:
            return
        if self._searching:
            self.post_message(self.Searched(event.value))
            return
        self._hint(hint(event.value))
        if event.value.startswith("route ") and "=f" in event.value:
            self.post_message(self.NamesFaults())

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        line = event.value.strip()
        if self._searching or not line:
            self.action_close(kept=True)
            return
        try:
            parse(line)
        except DSV4Error as error:
            self._hint(error_text(error.message, error.hint), error=True)
            return
        self.history.add(line)
        self.action_close()
        self.post_message(self.Entered(line))
