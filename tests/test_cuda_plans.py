"""How the CUDA wrappers divide work, which needs no GPU: shares of keys, tokens of a block, windows."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.engine.cuda.attention import Plan, plan
from dsv4_bench.engine.cuda.indexer import _tokens_per_block
from dsv4_bench.engine.step import Step

PROCESSORS = 132


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("widths", [(0, 0), (1, 0), (128, 512), (64, 0), (128, 1024), (70, 8192)])
@pytest.mark.parametrize("heads", [1, 64, 65, 128])
def test_no_share_is_empty_and_all_run_at_once(
    heads: int, widths: tuple[int, int], few: bool
) -> None:
    blocks = sum(-(-width // 64) for width in widths)
    for n in (1, 2, 3, 8, 14, 20, 31, 40, 64, 131, 132, 4096):
        how = plan(n, heads, widths, PROCESSORS, few)
        tiles, each = n * -(-heads // how.heads), -(-blocks // how.shares)
        assert how.shares == 1 or tiles * how.shares <= 2 * PROCESSORS
        if blocks:
            assert (how.shares - 1) * each < blocks
        if how.heads < 64:  # what a CTA has room for, and a cluster
            assert few and each <= 2 and how.shares <= 16 and not how.combined
        elif how.combined:
            assert 1 < how.shares <= 64
        else:
            assert how.shares in (1, 2, 4)


def test_few_tokens_use_many_processors() -> None:
    assert plan(1, 64, (128, 512), PROCESSORS) == Plan(16, 10)  # a block of 64 keys each
    assert plan(1, 64, (128, 8192), PROCESSORS) == Plan(64, 44, combined=True)
    assert plan(64, 64, (128, 512), PROCESSORS) == Plan(64, 2)
    assert plan(67, 64, (128, 512), PROCESSORS) == Plan(64, 1)


def step_of(starts: tuple[int, ...], lengths: tuple[int, ...]) -> Step:
    return Step(torch.zeros(sum(lengths), dtype=torch.int64), starts, lengths, 128)


def test_tokens_of_a_block() -> None:
    decode = step_of((4000, 9), (1, 1))
    assert _tokens_per_block(decode, 1000, PROCESSORS) == 1
    prefill = step_of((0,), (4096,))
    assert _tokens_per_block(prefill, 16384, PROCESSORS) == 64
    assert _tokens_per_block(prefill, 256, PROCESSORS) == 4096 // (4 * PROCESSORS)
    assert _tokens_per_block(step_of((0,), (2,)), 1, PROCESSORS) == 1


def test_table_of_sequences() -> None:
    """Start, length, first row of the inputs, first window of the output."""
    step = step_of((5, 0, 126), (3, 1, 131))
    assert step.closed(4) == [1, 0, 33]
    assert step.sequence_table(4).tolist() == [[5, 3, 0, 0], [0, 1, 3, -1], [126, 131, 4, 1]]
