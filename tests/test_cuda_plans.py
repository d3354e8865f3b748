"""How the CUDA wrappers divide work, which needs no GPU: shares of keys, tokens of a block, windows."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.engine.cuda.attention import shares
from dsv4_bench.engine.cuda.indexer import _tokens_per_block
from dsv4_bench.engine.step import Step

PROCESSORS = 132


@pytest.mark.parametrize("widths", [(0, 0), (1, 0), (128, 512), (64, 0), (128, 1024), (70, 8192)])
@pytest.mark.parametrize("heads", [1, 64, 65, 128])
@pytest.mark.parametrize("n", [1, 2, 8, 31, 64, 131, 132, 4096])
def test_no_share_is_empty_and_all_run_at_once(n: int, heads: int, widths: tuple[int, int]) -> None:
    blocks, tiles = sum(-(-width // 64) for width in widths), n * -(-heads // 64)
    count = shares(n, heads, widths, PROCESSORS)
    assert count == 1 or (count <= 64 and tiles * count <= PROCESSORS)
    if blocks:
        assert (count - 1) * -(-blocks // count) < blocks


def test_few_tokens_use_many_processors() -> None:
    assert shares(1, 64, (128, 512), PROCESSORS) == 10  # a block of 64 keys each
    assert shares(64, 64, (128, 512), PROCESSORS) == 2
    assert shares(67, 64, (128, 512), PROCESSORS) == 1


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
