"""Finds registers that a pending wgmma may still read and that are written: from the disassembly, for test_sass.py.

wgmma reads a first operand in registers when it runs, not when it is issued, and until its group has
been waited for the registers must stay. ptxas sees to that in straight code; around a loop it was
seen not to (13.4), and no warning says so. In SASS a wgmma is HGMMA (QGMMA for 8 bits), one with `gsb0`
ends a group, and WARPGROUP.DEPBAR.LE gsb0, N waits until at most the last N groups are pending.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\bBRA(?:\.\w+)*\b.*?0x([0-9a-f]+)")
_OPERAND = re.compile(r"GMMA\S* R\d+, R(\d+)[.,]")  # a first operand in registers
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_WRITTEN = re.compile(r"^(?:@!?U?P\w+ )?(\S+) (?:PT, |!?P\d, )?R(\d+)\b")
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "SYNCS",
    "WARPGROUP",
    "UTMA",
    "R2UR",
    "EXIT",
    "ISETP",
    "FSETP",
)
_MOST_GROUPS = 8

Groups = tuple[frozenset[int], ...]  # registers of pending groups, the newest first


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def operand(self) -> frozenset[int]:
        """Registers that a wgmma reads as its first operand."""
        found = _OPERAND.search(self.text)
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()

    @property
    def written(self) -> frozenset[int]:
        """Registers written, but for the sums of a wgmma."""
        found = _WRITTEN.match(self.text)
        if found is None or "GMMA" in found[1] or found[1].startswith(_NO_RESULT):
            return frozenset()
        wide = 4 if ".128" in found[1] else 2 if ".64" in found[1] or "WIDE" in found[1] else 1
        return frozenset(range(int(found[2]), int(found[2]) + wide))


def functions(library: Path, cuobjdump: Path, path: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Every kernel of a library and its instructions; `path` is where cuobjdump finds nvdisasm."""
    done = subprocess.run(
        [cuobjdump, "-sass", library],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": path},
    )
    for part in done.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name, [Instruction(int(a, 16), text) for a, text in _INSTRUCTION.findall(body)]


def cubin_in(object_file: Path, cubin: Path) -> Path:
    """Write the device code that lies in an object file of CuTe-DSL, an ELF file inside another."""
    data = object_file.read_bytes()
    cubin.write_bytes(data[data.index(b"\x7fELF", 4) :])
    return cubin


def hazards(code: list[Instruction]) -> list[Instruction]:
    """Instructions that write what a pending wgmma may still read, along any path."""
    where = {instruction.address: i for i, instruction in enumerate(code)}
    before: list[Groups | None] = [None] * len(code)
    found, work = set(), [(0, ())]
    while work:
        i, arriving = work.pop()
        known = before[i] if i < len(code) else ()
        merged = _merged(known, arriving)
        if i >= len(code) or merged == known:
            continue
        before[i] = merged
        instruction = code[i]
        if any(instruction.written & group for group in merged):
            found.add(i)
        after = _after(instruction, merged)
        target = _TARGET.search(instruction.text)
        if target is not None and int(target[1], 16) in where:
            work.append((where[int(target[1], 16)], after))
        if not instruction.text.startswith(("BRA", "EXIT", "RET")):
            work.append((i + 1, after))
    return [code[i] for i in sorted(found)]


def _merged(a: Groups | None, b: Groups) -> Groups:
    """What may be pending where two paths meet."""
    if a is None:
        return b
    longest = max(len(a), len(b))
    padded = [(*groups, *[frozenset[int]()] * (longest - len(groups))) for groups in (a, b)]
    return tuple(x | y for x, y in zip(*padded, strict=True))


def _after(instruction: Instruction, groups: Groups) -> Groups:
    """What is pending after an instruction; the first group is still open, if there is one."""
    wait = _WAIT.search(instruction.text)
    if wait is not None:
        return (frozenset(), *groups[1 : 1 + int(wait[1], 16)]) if groups else ()
    if "GMMA" not in instruction.text:
        return groups
    newest = (groups[0] if groups else frozenset()) | instruction.operand
    groups = (newest, *groups[1:])
    if "gsb0" in instruction.text:
        groups = (frozenset(), *groups)
    if len(groups) > _MOST_GROUPS:  # the oldest ones together
        rest = frozenset().union(*groups[_MOST_GROUPS - 1 :])
        groups = (*groups[: _MOST_GROUPS - 1], rest)
    return groups
