"""What Nsight Compute counted in an op's kernels, as text. Pure."""

from __future__ import annotations

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import Event, real
from dsv4_bench.workbench.tui.spans import BAD, BOLD, DIM, PLAIN, Line

_SHARES = (("dram", "DRAM"), ("compute", "compute"), ("occupancy", "warps active"))
_BAR = 30  # cells of 100 %


def counter_lines(found: Event, width: int) -> list[Line]:
    """A paragraph a kernel: duration, shares of the peaks as bars, registers, worst stalls."""
    kernels = found["kernels"]
    if not kernels:
        return [[("no kernel ran at this site", BAD)]]
    total = sum(real(kernel["seconds"]) or 0.0 for kernel in kernels)
    lines: list[Line] = [
        [(f"{len(kernels)} kernel{'s' if len(kernels) > 1 else ''}, {fmt.seconds(total)}", BOLD),
         ("  every kernel alone; cold and below: with empty caches", DIM)]
    ]  # fmt: skip
    for kernel in kernels:
        lines += [[], [(fmt.clip(kernel["kernel"], width), BOLD)], [(_facts(kernel), PLAIN)]]
        for name, label in _SHARES:
            share = real(kernel[name])
            if share is not None:
                cells = round(_BAR * min(share, 100.0) / 100)
                lines.append([(f"  {label:<13}{share:>5.0f} %  ", DIM), ("█" * cells, PLAIN)])
        stalls = ", ".join(f"{name} {fmt.number(v)}" for name, v in kernel["stalls"].items())
        if stalls:
            lines.append([(fmt.clip(f"  waits for    {stalls} cycles an issue", width), DIM)])
    return lines


def _facts(kernel: Event) -> str:
    moved, seconds, cold = (real(kernel[name]) for name in ("dram_bytes", "seconds", "cold"))
    parts = [f"  {fmt.seconds(seconds)}", f"cold {fmt.seconds(cold)}"]
    if kernel["registers"] is not None:
        parts.append(f"{fmt.number(kernel['registers'])} registers")
    if moved is not None:
        parts.append(f"{fmt.size(int(moved))} of DRAM")
        if cold:
            parts.append(f"{moved / cold / 1e12:.2f} TB/s")
    return ", ".join(parts)
