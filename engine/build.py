"""Content-addressed kernel builds: the same sources, flags and compiler give the same folder.

A build lives in ``<cache>/<name>-<key>/``: the shared object, the sources it was made from, the
command and the compiler's log. It is compiled in a temporary folder and published by one rename,
under a lock the system drops when its holder dies, so neither a killed build nor two at once can
leave half a file. Nothing is compiled at import, and no time stamp decides anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path

from dsv4_bench.engine.demo import cache_folder
from dsv4_bench.engine.errors import CannotAnswer

_LOG = logging.getLogger(__name__)
_ERROR_LINES = 8  # of the compiler's output shown in an error message
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def compiler() -> tuple[str | None, str]:
    """The C++ compiler's command ($CXX, else g++, c++ or clang++) and "", or None and the reason."""
    chosen = os.environ.get("CXX")
    if chosen:
        words = shlex.split(chosen)
        if words and shutil.which(words[0]):
            return chosen, ""
        return None, f"no C++ compiler: $CXX is {chosen!r}, which is not an executable"
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path, ""
    return None, "no C++ compiler: set $CXX or install g++"


@lru_cache
def compiler_version(command: str) -> str:
    """What `command --version` prints. Raises CannotAnswer if it does not run."""
    try:
        done = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotAnswer(f"{command} --version failed: {error}", "set $CXX") from error
    return done.stdout


def cache_dir() -> Path:
    """Where builds are kept: ``kernels`` in $DSV4_CACHE or the user's cache folder."""
    return cache_folder().absolute() / "kernels"


def csrc() -> Path:
    """The folder of the kernel sources, in a checkout and in an installed package alike."""
    return Path(str(resources.files("dsv4_bench.csrc")))


def _digest(*parts: bytes) -> str:
    """Hash of the parts; each one's length goes in too, so that no two lists run together."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Build:
    """One shared object to make: `compiler *flags -o library *sources`, run in the source folder.

    `sources` are paths below `root`; what they include by a quoted name is found from there, and so
    on, whatever the preprocessor would leave out. `arch` is what the code is for (an ISA, an SM); it is part of the key even where the
    flags do not show it. `compiler` None stands for a machine without one: then only a build made
    earlier can be found. Files are read once, here, and compiled from that copy: what was hashed
    is what is built, even while someone edits them.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    arch: str
    compiler: str | None
    root: Path = field(default_factory=lambda: csrc())  # looked up now, for tests that replace it
    files: dict[str, bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        files: dict[str, bytes] = {}
        waiting = list(self.sources)
        while waiting:
            name = waiting.pop()
            files[name] = (self.root / name).read_bytes()
            for quoted in _INCLUDE.findall(files[name]):
                header = posixpath.normpath(
                    f"{posixpath.dirname(name)}/{quoted.decode()}".strip("/")
                )
                if header not in files and (self.root / header).is_file():
                    waiting.append(header)
        object.__setattr__(self, "files", dict(sorted(files.items())))

    @cached_property
    def content(self) -> str:
        """Hash of everything but the compiler."""
        words = [self.arch, *self.flags, "", *self.sources]
        text = [word.encode() for word in words]
        return _digest(*text, *(part for n, c in self.files.items() for part in (n.encode(), c)))

    @cached_property
    def key(self) -> str:
        """12 digits for sources, flags and arch, 8 for the compiler: ``<content>-<compiler>``."""
        if self.compiler is None:
            raise CannotAnswer(f"{self.name} is not built, and there is {compiler()[1]}")
        version = compiler_version(self.compiler)
        return f"{self.content[:12]}-{_digest(self.compiler.encode(), version.encode())[:8]}"

    @property
    def folder(self) -> Path:
        return cache_dir() / f"{self.name}-{self.key}"

    def identity(self) -> str:
        """The name of the build that runs here: `name` and key.

        Without a compiler it is that of the build that was found, else the key's second part is empty.
        """
        if self.compiler is not None:
            return f"{self.name}-{self.key}"
        found = self.find()
        return f"{self.name}-{self.content[:12]}-" if found is None else found.parent.name

    def find(self) -> Path | None:
        """The library if it is built; without a compiler, one that any compiler made."""
        if self.compiler is not None:
            library = self.folder / f"{self.name}.so"
            return library if library.exists() else None
        pattern = f"{self.name}-{self.content[:12]}-????????/{self.name}.so"
        return next(iter(sorted(cache_dir().glob(pattern))), None)

    def library(self) -> Path:
        """The shared object, built now if need be. Raises CannotAnswer: no compiler, or it failed."""
        found = self.find()
        if found is not None:
            return found
        folder = self.folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent / f"{folder.name}.lock"):
                if self.find() is None:  # else another process has just built it
                    self._build(folder)
        except OSError as error:
            raise CannotAnswer(
                f"cannot write the kernel cache {folder.parent}: {error.strerror or error}",
                "set $DSV4_CACHE to a folder with room that you may write to",
            ) from error
        return folder / f"{self.name}.so"

    def command(self) -> list[str]:
        assert self.compiler is not None
        return [*shlex.split(self.compiler), *self.flags, "-o", f"{self.name}.so", *self.sources]

    def _build(self, folder: Path) -> None:
        """Compile in a temporary folder and rename it to `folder`; the lock is held."""
        # What an earlier build left: its process is dead, since we hold the lock.
        for left in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            for name, text in self.files.items():
                path = work / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
            (work / "command.txt").write_text(shlex.join(self.command()) + "\n")
            _LOG.info("building %s", folder)
            self._compile(work, folder)
            _sync(work)
            _replace(work, folder)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _run(self, work: Path) -> int:
        """Run the compiler in `work`, what it says into build.log; its exit code."""
        with (work / "build.log").open("wb") as log:
            return subprocess.run(
                self.command(),
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(work)},  # the compiler's own files fill our disk
            ).returncode

    def _compile(self, work: Path, folder: Path) -> None:
        """Run the compiler; on failure keep the folder as ``<folder>.failed`` and raise."""
        code = self._run(work)
        if code == 0 and (work / f"{self.name}.so").exists():
            return
        failed = folder.with_name(f"{folder.name}.failed")
        text = (work / "build.log").read_text(errors="replace").replace(f"{work}/", "")
        _replace(work, failed)
        raise CannotAnswer(
            f"building {self.name} failed (exit {code}):\n{_first_errors(text)}\n"
            f"command: {shlex.join(self.command())}\nlog: {failed / 'build.log'}",
            "the compiler's folder is kept beside the log, with the sources it saw",
        )


def _first_errors(text: str) -> str:
    """The compiler's first error lines; its last lines if none is marked as an error."""
    lines = [line for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    marks = ("error", "-->", "No space left", "cannot find", "undefined reference")
    marked = [line for line in lines if any(mark in line for mark in marks)]
    return "\n".join(marked[:_ERROR_LINES] or lines[-_ERROR_LINES:] or ["(no output)"])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it ends with the process, whatever happens to it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(source: Path, target: Path) -> None:
    """Rename a folder over `target`; one that is in the way is a damaged or older build."""
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)


def _sync(folder: Path) -> None:
    """Everything below `folder` reaches the disk before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
