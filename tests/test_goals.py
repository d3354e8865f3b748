"""Where a run stops, for every way of moving."""

from __future__ import annotations

import pytest

from dsv4_bench.workbench import goals

ORDER = [
    "embed",
    "L0/attn/hc_pre",
    "L0/attn/compressor/write",
    "L0/attn/index/wq",
    "L0/attn/index/compressor/wkv",
    "L0/attn/index/compressor/write",
    "L0/attn/index/topk",
    "L0/attn/core",
    "L0/ffn/gate",
    "L0/ffn/sum",
    "L1/attn/core",
    "head/norm",
    "head/logits",
]


def run(goal, start=-1):
    """The site where `goal` stops a run that goes on after op `start`, and why."""
    for index in range(start + 1, len(ORDER)):
        why = goal.reached(ORDER, index)
        if why:
            return ORDER[index], why
    return None, None


def after(path):
    return ORDER.index(path)


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        ("embed", "L0/attn/hc_pre"),
        ("L0/attn/hc_pre", "L0/attn/compressor/write"),
        ("L0/attn/compressor/write", "L0/attn/index/topk"),
        ("L0/attn/index/topk", "L0/attn/core"),
        ("L0/attn/index/wq", "L0/attn/index/compressor/write"),
        ("L0/attn/index/compressor/wkv", "L0/attn/index/compressor/write"),
        ("L0/attn/index/compressor/write", "L0/attn/index/topk"),
        ("L0/attn/core", "L0/ffn/gate"),
        ("L0/ffn/sum", "L1/attn/core"),
        ("head/norm", "head/logits"),
    ],
)
def test_next(start, stop):
    level = goals.level_of(ORDER, after(start))
    assert run(goals.Over(group=level), after(start)) == (stop, "step")


def test_next_counts_units():
    level = goals.level_of(ORDER, after("L0/attn/hc_pre"))
    assert run(goals.Over(group=level, count=2), after("L0/attn/hc_pre"))[0] == "L0/attn/index/topk"


def test_steps_count():
    assert run(goals.Steps(count=3)) == (ORDER[2], "step")


@pytest.mark.parametrize(
    ("start", "stop", "why"),
    [
        (
            "L0/attn/index/compressor/wkv",
            "L0/attn/index/compressor/write",
            "L0/attn/index/compressor",
        ),
        ("L0/attn/index/wq", "L0/attn/index/topk", "L0/attn/index"),
        ("L0/attn/hc_pre", "L0/attn/core", "L0/attn"),
        ("embed", "head/logits", "the forward pass"),
    ],
)
def test_finish(start, stop, why):
    goal = goals.EndOfGroup(group=goals.group_of(start))
    assert run(goal, after(start)) == (stop, f"end of {why}")


@pytest.mark.parametrize(
    ("start", "count", "stop"),
    [(-1, 1, "L0/ffn/sum"), (1, 1, "L0/ffn/sum"), (1, 2, "L1/attn/core"), (10, 1, "head/logits")],
)
def test_layers(start, count, stop):
    assert run(goals.Layers(count=count), start)[0] == stop


def test_until_index_and_run():
    assert run(goals.Until(pattern="*/core"), after("L0/attn/core")) == (
        "L1/attn/core",
        "until */core",
    )
    assert run(goals.Until(pattern="head"))[0] == "head/norm"
    assert run(goals.Index(index=4, why="back")) == (ORDER[4], "back")
    assert run(goals.Run()) == (None, None)
