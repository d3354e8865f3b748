"""Fixtures that several test modules share. Import-light: no torch before a fixture needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_bench.engine.config import TINY, Config

# The tensors here are small: threads that wait for each other cost far more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DSV4_HISTORY"] = ""  # times of tests are nobody's history

# Every kind of layer, ragged 128x128 blocks, an indexer that selects from 32 tokens on.
SMALL = replace(
    TINY,
    vocab_size=300,
    hidden_size=128,
    num_hidden_layers=4,
    head_dim=128,
    qk_rope_head_dim=32,
    q_lora_rank=64,
    o_lora_rank=64,
    moe_intermediate_size=64,
    num_hash_layers=1,
    index_head_dim=64,
    index_topk=8,
    compress_ratios=(0, 4, 128, 4),
)


def with_ratios(config: Config, *ratios: int) -> Config:
    return replace(config, num_hidden_layers=len(ratios), compress_ratios=ratios)


MakeCheckpoint = Callable[..., Path]
Plant = Callable[[str, Callable[..., Any]], None]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`make_checkpoint(layout="nvfp4", config=SMALL, seed=0)`: written once a worker, read-only."""
    made: dict[tuple[str, Config, int], Path] = {}

    def make(layout: str = "nvfp4", config: Config = SMALL, seed: int = 0) -> Path:
        from dsv4_bench.engine.synthetic import write_checkpoint

        key = (layout, config, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / layout
            made[key] = write_checkpoint(folder, config, layout, seed)
        return made[key]

    return make


@pytest.fixture
def editable(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> MakeCheckpoint:
    """Like `make_checkpoint`, a copy of its own that the test may damage."""
    import shutil

    def copy(layout: str = "nvfp4", config: Config = SMALL, seed: int = 0) -> Path:
        source = make_checkpoint(layout, config, seed)
        return Path(shutil.copytree(source, tmp_path / "checkpoint"))

    return copy


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DSV4_CACHE of the test's own; no DSV4_CKPT."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DSV4_CACHE", str(folder))
    monkeypatch.delenv("DSV4_CKPT", raising=False)
    return folder


@pytest.fixture
def plant() -> Iterator[Plant]:
    """Registers implementations named `bug` for one test: plant(op, function)."""
    from dsv4_bench.engine.registry import IMPLEMENTATIONS, implementation

    planted: list[str] = []

    def register(op: str, function: Callable[..., Any]) -> None:
        implementation(op=op, name="bug")(function)
        planted.append(op)

    yield register
    for op in planted:
        IMPLEMENTATIONS[op].pop("bug", None)


@pytest.fixture(autouse=True)
def keep_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main([..., "--json"])` takes over file descriptor 1 for good; not in the tests' process."""
    from dsv4_bench.workbench.cli import output

    monkeypatch.setattr(output, "reserve_stdout", lambda: None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What the test measured of implementations goes into its JUnit properties; see verified.py."""
    if (verified := sys.modules.get("verified")) is not None:
        item.user_properties += verified.take()
