"""Pictures of the real program on the demo checkpoint, for the README: `make screenshots`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from dsv4_bench.workbench.session import Session, SessionOptions
from dsv4_bench.workbench.tui.app import WorkbenchApp

SIZES = {"workbench": (140, 42)}
STEPS = (
    "shadow on",
    "carried on",
    "break nan > 0",
    "watch (post.sum(1) - 2).abs().max()",
    "route L4/attn/hc_post=fault/comb_transposed",
    "until L4/attn/hc_post",
)
PATIENCE = 60.0  # seconds for one command


async def take(folder: Path, name: str, size: tuple[int, int]) -> None:
    """Drive one app through STEPS and export what it shows."""
    app = WorkbenchApp(lambda on_event: Session(SessionOptions(), on_event), checkpoint="demo")
    async with app.run_test(size=size) as pilot:
        await _until(lambda: app.store.state.get("state") == "ready")
        for line in STEPS:
            before = app.store.state.get("site")
            app.send(line)
            moves = line.startswith(("until", "back"))
            await _until(lambda b=before, m=moves: _settled(app) and (not m or _moved(app, b)))
        for _ in range(10):
            await pilot.pause(0.3)
        (folder / f"{name}.svg").write_text(app.export_screenshot(title="dsv4-bench"))


def _settled(app: WorkbenchApp) -> bool:
    return app.store.idle and not app.queries.waiting


def _moved(app: WorkbenchApp, before: str | None) -> bool:
    return app.store.state.get("site") != before


async def _until(condition: object) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.05)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name, size in SIZES.items():
        asyncio.run(take(folder, name, size))
        print(f"wrote {folder / name}.svg")


if __name__ == "__main__":
    main()
