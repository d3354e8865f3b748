"""How the CUDA wrappers divide work, which needs no GPU: shares of keys, tokens of a block, windows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv4_bench.engine.cuda.attention import Plan, last_tokens, plan
from dsv4_bench.engine.cuda.indexer import _tokens_per_block
from dsv4_bench.engine.step import Step

PROCESSORS = 132


# Clusters of 1, 2, ... CTAs that an H200 said it runs at once.
AT_ONCE = (132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7)


def at_once(ranks: int) -> int:
    return AT_ONCE[ranks - 1]


@pytest.mark.parametrize("fits", [None, at_once])
@pytest.mark.parametrize("widths", [(0, 0), (1, 0), (128, 512), (64, 0), (128, 1024), (70, 8192)])
@pytest.mark.parametrize("heads", [1, 64, 65, 128])
def test_no_share_is_empty_and_all_run_at_once(
    heads: int, widths: tuple[int, int], fits: Callable[[int], int] | None
) -> None:
    blocks = sum(-(-width // 64) for width in widths)
    for n in (*range(73), 131, 132, 4096):
        how = plan(n, heads, widths, PROCESSORS, fits)
        tiles, each = n * -(-heads // how.heads), -(-blocks // how.shares)
        assert how.shares == 1 or tiles * how.shares <= PROCESSORS
        if blocks:
            assert (how.shares - 1) * each < blocks
        if how.heads < 64:  # what a CTA has room for, and a cluster
            assert each <= 2 and how.shares <= 16 and not how.combined
            assert fits is not None and tiles <= fits(how.shares)
        elif how.combined:
            assert 1 < how.shares <= 64
        else:
            assert how.shares in (1, 2)


# Measured, us (docs/cuda_attention.md), of 128 + 512 keys: heads and shares, combined or not.
TIMES = {
    1: {(16, 10): 8.41, (16, 5): 8.70, (32, 5): 10.77, (64, 10): 12.72, (64, 2): 16.59},
    5: {(16, 10): 11.43, (16, 5): 9.84, (32, 5): 11.47, (64, 10): 13.67, (64, 2): 16.74},
    6: {(16, 10): 19.20, (16, 5): 17.86, (32, 5): 11.95, (64, 10): 13.92, (64, 2): 16.83},
    11: {(16, 10): 29.76, (16, 5): 20.42, (32, 5): 13.10, (64, 5): 15.55, (64, 2): 17.08},
    12: {(16, 10): 31.43, (16, 5): 27.55, (32, 5): 23.19, (64, 5): 15.66, (64, 2): 17.02},
    16: {(32, 5): 23.86, (64, 5): 18.36, (64, 2): 17.18},
    20: {(32, 5): 24.44, (64, 5): 19.75, (64, 2): 17.32},
    66: {(64, 2): 20.57, (64, 1): 24.88},
}


@pytest.mark.parametrize("n", TIMES)
def test_the_fastest_form_is_chosen(n: int) -> None:
    how = plan(n, 64, (128, 512), PROCESSORS, at_once)
    assert (how.heads, how.shares) == min(TIMES[n], key=lambda form: TIMES[n][form])


def test_plans() -> None:
    assert plan(1, 64, (128, 8192), PROCESSORS, at_once) == Plan(64, 44, combined=True)
    assert plan(1, 64, (128, 512), PROCESSORS) == Plan(64, 10, combined=True)
    assert plan(64, 64, (128, 512), PROCESSORS, at_once) == Plan(64, 2)
    assert plan(67, 64, (128, 512), PROCESSORS, at_once) == Plan(64, 1)
    assert plan(12, 64, (64, 0), PROCESSORS, at_once) == Plan(16, 1)  # a block of keys


def test_what_is_left_of_the_last_round() -> None:
    def tokens(n: int, heads: int = 64) -> int:
        def plan_of(rest: int) -> Plan:
            return plan(rest, heads, (128, 512), PROCESSORS, at_once)

        return last_tokens(n, heads, PROCESSORS, plan_of)

    assert tokens(4096) == 4  # 31 rounds of 132
    assert tokens(4096, 128) == 4  # 62 of 66 tokens
    assert tokens(132 + 11) == 11 and tokens(132 + 12) == 0  # more than clusters take at once
    assert tokens(11) == tokens(131) == tokens(132) == tokens(264) == 0


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
