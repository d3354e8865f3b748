"""Completion, hints and history of the command line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from dsv4_bench.workbench.commands import BY_NAME, SESSION_COMMANDS
from dsv4_bench.workbench.tui.store import command_name

FAMILIES = ("kernel", "reference")
READINGS = ("nan > 0", "inf > 0", "own_error > limit", "abs_max > ")
WORDS = {
    "shadow": ("on", "off", "*/core"),
    "probes": ("all", "none"),
    "route": FAMILIES,
}


@dataclass
class Names:
    """What a line can name: sites with their op, expressions, implementations of each op."""

    sites: Mapping[str, str] = field(default_factory=dict)
    expressions: Sequence[str] = ()
    implementations: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of_sites(self, pattern: str) -> list[str]:
        """The implementations of all ops under a site glob."""
        ops = dict.fromkeys(
            op for path, op in self.sites.items() if fnmatchcase(path, pattern)
            or fnmatchcase(path, pattern + "/*")
        )  # fmt: skip
        return list(dict.fromkeys(name for op in ops for name in self.implementations.get(op, ())))


def complete(text: str, names: Names) -> list[str]:
    """Whole lines that `text` can become, best first."""
    name, space, rest = text.lstrip().partition(" ")
    if not space:
        return [
            command.name + (" " if command.arguments else "")
            for command in SESSION_COMMANDS
            if command.name.startswith(name)
        ]
    command = BY_NAME.get(name)
    if command is None:
        return []
    head, _, word = rest.rpartition(" ")
    prefix = f"{name} {head} " if head else f"{name} "
    return [prefix + item for item in _words(name, head, word, names)]


def _words(name: str, head: str, word: str, names: Names) -> list[str]:
    kinds = {argument.kind for argument in BY_NAME[name].arguments}
    candidates: list[str] = list(WORDS.get(name, ()))
    if name in ("print", "eval", "watch"):
        candidates += names.expressions
    pattern, equals, _ = word.partition("=")
    if name == "route" and equals:
        wanted = [*FAMILIES, *names.of_sites(pattern)]
        candidates = [f"{pattern}={item}" for item in dict.fromkeys(wanted)]
    if name == "break" and head:
        return [item for item in READINGS if item.startswith(word)]
    if not head and ("site" in kinds or name in ("break", "route", "shadow")):
        candidates += _sites(word, names.sites)
    return [item for item in candidates if item.startswith(word)]


def _sites(word: str, sites: Iterable[str]) -> list[str]:
    """Sites one path part at a time: L3/ before L3/attn/core."""
    stems: dict[str, None] = {}
    for site in sites:
        if site.startswith(word):
            cut = site.find("/", len(word))
            stems[site if cut < 0 else site[: cut + 1]] = None
    return list(stems)


def common(lines: Sequence[str]) -> str:
    """The longest prefix that all of `lines` share."""
    if not lines:
        return ""
    low, high = min(lines), max(lines)
    same = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return low[: next(same, len(low))]


def hint(text: str) -> str:
    """Usage and help of the command being typed, or what is wrong with it."""
    name = text.strip().split(" ")[0]
    if not name:
        return "tab completes, up and down walk the history, escape closes"
    command = BY_NAME.get(command_name(name))
    if command is not None:
        return f"{command.usage}   {command.help}"
    names = complete(name, Names())
    return "  ".join(names) if names else f"no command starts with {name!r}; ? lists them"


@dataclass
class History:
    """Lines typed before; `up` from a half-typed line walks those that start with it."""

    lines: list[str] = field(default_factory=list)
    position: int | None = None
    draft: str = ""

    def add(self, line: str) -> None:
        if line and (not self.lines or self.lines[-1] != line):
            self.lines.append(line)
        self.position = None

    def move(self, text: str, step: int) -> str:
        if self.position is None or text != self.lines[self.position]:
            self.draft, self.position = text, len(self.lines)
        index = self.position + step
        while 0 <= index < len(self.lines):
            if self.lines[index].startswith(self.draft):
                self.position = index
                return self.lines[index]
            index += step
        if index >= len(self.lines):
            self.position = None
            return self.draft
        return text
