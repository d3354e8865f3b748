"""Times that were measured before, kept as one small JSON file a run

Every `profile`, every `timing` of a session and every attempt of watch mode leaves a run in
$DSV4_HISTORY, else in the cache folder; set to nothing, none is kept. A file that is damaged, too large or of another schema is passed over; the oldest give way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dsv4_bench.engine.demo import cache_folder
from dsv4_bench.engine.registry import matches

SCHEMA_VERSION = 1
MOST_RUNS, MOST_BYTES = 300, 16 << 20  # of the folder
_LARGEST = 1 << 20  # bytes of one file
_FIELDS = ("when", "what", "checkpoint", "device", "conditions")


@dataclass(frozen=True)
class Entry:
    """One implementation of one site in one run.

    `what` measured it: profile, timing or watch. `conditions`: phase, tokens, dtype and whatever else
    times depend on. `seconds` is None of an attempt that failed, and `problem` says how.
    """

    site: str
    implementation: str
    hash: str = ""
    seconds: float | None = None
    own_error: float | None = None
    limit: float | None = None
    verdict: str = ""
    problem: str = ""


def of_row(row: dict[str, Any]) -> list[Entry]:
    """The entries of a site's times, as SiteTime.to_dict gives them: the reference, and the kernel."""
    entries = [Entry(row["site"], "reference", seconds=row["seconds"]["reference"])]
    if row["kernel"] != "reference":
        entries.append(
            Entry(
                row["site"], row["kernel"], row["hash"], row["seconds"][row["kernel"]],
                row["own_error"], row["limit"], row["verdict"],
            )
        )  # fmt: skip
    return entries


def keep(
    what: str, checkpoint: str, device: str, conditions: str, entries: Iterable[Entry]
) -> Path | None:
    """Add a run; None where none is kept or the place cannot be written, which loses nothing else."""
    run = {
        "schema_version": SCHEMA_VERSION,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "what": what,
        "checkpoint": checkpoint,
        "device": device,
        "conditions": conditions,
        "process": os.getpid(),
        "sites": [asdict(entry) for entry in entries],
    }
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{time.time_ns():020d}-{os.getpid()}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run) + "\n")
        part.replace(path)
        _make_room()
    except OSError:
        return None
    return path


def rows(pattern: str, most: int = 500) -> list[dict[str, Any]]:
    """What was measured at the sites under `pattern`, newest first: an Entry's fields and its run's.

    Of a run, kernels come before the reference that was timed beside them.
    """
    found: list[dict[str, Any]] = []
    for path in reversed(_files()):
        for entry, about in reversed(_read(path)):
            if matches(entry.site, pattern):
                found.append({**about, **asdict(entry)})
        if len(found) >= most:
            break
    return found[:most]


def _folder() -> Path | None:
    chosen = os.environ.get("DSV4_HISTORY")
    if chosen is None:
        return cache_folder() / "history"
    return Path(chosen).expanduser() if chosen else None


def _files() -> list[Path]:
    """The runs' files, oldest first."""
    folder = _folder()
    try:
        return sorted(folder.glob("*.json")) if folder is not None else []
    except OSError:
        return []


def _make_room() -> None:
    sizes = {path: path.stat().st_size for path in _files()}
    total = sum(sizes.values())
    for number, (path, size) in enumerate(sizes.items()):
        if len(sizes) - number <= MOST_RUNS and total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _read(path: Path) -> list[tuple[Entry, dict[str, Any]]]:
    """The entries of one file, each with what is common to its run; none of a damaged one."""
    try:
        if path.stat().st_size > _LARGEST:
            return []
        run = json.loads(path.read_text())
        if run["schema_version"] != SCHEMA_VERSION:
            return []
        about = {name: str(run[name]) for name in _FIELDS} | {"process": int(run["process"])}
        return [(_entry(item), about) for item in run["sites"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _entry(item: dict[str, Any]) -> Entry:
    """Raises TypeError or ValueError for fields that are not what an Entry holds."""
    entry = Entry(**item)
    texts = (entry.site, entry.implementation, entry.hash, entry.verdict, entry.problem)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not text")
    numbers = {
        name: None if getattr(entry, name) is None else float(getattr(entry, name))
        for name in ("seconds", "own_error", "limit")
    }
    return Entry(**{**asdict(entry), **numbers})
