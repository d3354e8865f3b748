"""The CUDA kernels of indexer and compressor: against float64, hostile inputs, identical repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_judge import judge, kernel, same_each_time, views
from torch import Tensor

from dsv4_bench.engine.cuda.indexer import joins_rope_score, rope_index_score
from dsv4_bench.engine.step import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CONSTANTS = {"scale": 0.0123, "ratio": 4}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def step_of(*pieces: tuple[int, int]) -> Step:
    """Sequences by (start, length)."""
    starts, lengths = zip(*pieces, strict=True)
    return Step(torch.zeros(sum(lengths), dtype=torch.int64, device="cuda"), starts, lengths, 128)


def score_case(
    step: Step, heads: int = 64, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """Arguments of index_score; unused rows of the pools are NaN."""
    n, batch, capacity = sum(step.lengths), len(step.lengths), step.entries(4) + 5
    q = torch.randn(n, heads, dim, device="cuda").to(dtype)
    keys = torch.full((batch, capacity, dim), torch.nan, device="cuda", dtype=dtype)
    for b in range(batch):
        count = step.entries_of(b, 4)
        keys[b, :count] = torch.randn(count, dim, device="cuda").to(dtype)
    return q, keys, torch.randn(n, heads, device="cuda").to(dtype), step


# ------------------------------------------------------------------------------ scores

FREQS = {half: 1 / 10000 ** (torch.arange(half) / half) for half in (4, 20, 32, 64)}


@pytest.mark.parametrize("half", FREQS)
@pytest.mark.parametrize("filled", [False, True])
def test_scores_with_the_rope_of_the_queries(half: int, filled: bool) -> None:
    """The same bits as the two ops one after another, at small and at large angles."""
    freqs = FREQS[half].cuda()
    for pieces in (
        [(4, 1)],
        [(4095, 1)],
        [(3, 1), (70001, 1), (0, 1)],
        [(9000 + i, 1) for i in range(40)],
    ):
        step = step_of(*pieces)
        q, keys, weights, _ = score_case(step)
        after = kernel("rope", q, step.positions, freqs=freqs, inverse=False)["y"]
        assert joins_rope_score(q, keys, weights, step, freqs)
        turned = torch.full_like(q, torch.nan) if filled else None
        score = rope_index_score(q, keys, weights, step, freqs=freqs, turned=turned, **CONSTANTS)
        assert torch.equal(
            score, kernel("index_score", after, keys, weights, step, **CONSTANTS)["score"]
        )
        assert turned is None or torch.equal(turned, after)
        assert not torch.equal(after, q)


def test_scores_with_the_rope_where_it_is_not_one_launch() -> None:
    """Several tokens a sequence, other heads, float32, strided queries, no entry yet."""
    freqs = FREQS[32].cuda()
    one = step_of((4095, 1))
    cases = [
        score_case(step_of((100, 3))),
        score_case(one, heads=16),
        score_case(one, dtype=torch.float32),
        score_case(step_of((1, 1))),
    ]
    strided = score_case(one)
    cases.append((torch.cat([strided[0]] * 2, dim=-1)[..., :128], *strided[1:]))
    for q, keys, weights, step in cases:
        turned = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
        score = rope_index_score(q, keys, weights, step, freqs=freqs, turned=turned, **CONSTANTS)
        after = kernel("rope", q, step.positions, freqs=freqs, inverse=False)["y"]
        assert torch.equal(turned, after)
        assert torch.equal(
            score, kernel("index_score", after, keys, weights, step, **CONSTANTS)["score"]
        )
    assert not joins_rope_score(*cases[0], freqs) and not joins_rope_score(*cases[-1], freqs)
    assert not joins_rope_score(*score_case(one), freqs[:31])


@pytest.mark.parametrize(
    "entries", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4096]
)
def test_scores_of_decode(entries: int) -> None:
    judge("index_score", *score_case(step_of((4 * entries - 1, 1))), **CONSTANTS)


def test_scores_of_unequal_sequences() -> None:
    step = step_of((3, 1), (4095, 1), (0, 1), (1026, 1), (5000, 1))
    judge("index_score", *score_case(step), **CONSTANTS)
    step = step_of((0, 300), (777, 5), (4000, 129), (2, 1))
    judge("index_score", *score_case(step), **CONSTANTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(64, 128), (16, 128), (8, 128), (5, 128), (3, 40)])
def test_scores_of_any_shape(heads: int, dim: int, dtype: torch.dtype) -> None:
    judge("index_score", *score_case(step_of((60, 30), (700, 1)), heads, dim, dtype), **CONSTANTS)


def test_scores_of_long_prefill() -> None:
    judge("index_score", *score_case(step_of((0, 2048), (1000, 600))), **CONSTANTS)


def test_scores_keep_nan_and_views() -> None:
    q, keys, weights, step = score_case(step_of((700, 1), (400, 1)))
    plain = kernel("index_score", q, keys, weights, step, **CONSTANTS)["score"]
    for q_view, keys_view, w_view in zip(views(q), views(keys), views(weights), strict=True):
        got = kernel("index_score", q_view, keys_view, w_view, step, **CONSTANTS)["score"]
        assert torch.equal(got, plain)
    keys[0, 33, 5] = torch.nan
    got = kernel("index_score", q, keys, weights, step, **CONSTANTS)["score"]
    assert got[0, 33].isnan() and got.isnan().sum() == 1
    same_each_time("index_score", q, keys, weights, step, **CONSTANTS)


# ------------------------------------------------------------------------------ top-k


def check_topk(score: Tensor, visible: Tensor, k: int) -> None:
    hidden = torch.arange(score.shape[1], device="cuda") >= visible[:, None]
    judge("index_topk", score.masked_fill(hidden, -torch.inf), visible, k=k)


LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1024, 1025, 2048, 2049]
LENGTHS += [16384, 16385, 18000, 20480, 20481, 40000, 262144]


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("k", [512, 1024, 7])
def test_topk(total: int, k: int) -> None:
    n = 3
    score = torch.randn(n, total, device="cuda")
    check_topk(score, torch.tensor([total, (total + 1) // 2, 0], device="cuda"), k)
    few = torch.randint(0, 4, (n, total), device="cuda").float()
    check_topk(few, torch.tensor([total, total - 1, 1], device="cuda"), k)
    for value in (0.0, -3.0, -torch.inf):
        check_topk(
            torch.full((1, total), value, device="cuda"), torch.tensor([total], device="cuda"), k
        )


@pytest.mark.parametrize("total", [700, 4096, 16384, 20000, 100000, 262144, 300001])
def test_topk_of_odd_distributions(total: int) -> None:
    """Far outliers, a random walk, the best all in one place, one score above many equal ones."""
    whole = torch.tensor([total], device="cuda")
    outliers = torch.randn(1, total, device="cuda").exp().exp()
    walk = torch.randn(1, total, device="cuda").cumsum(1)
    steps = torch.arange(total, device="cuda").float()[None]
    peak = torch.zeros(1, total, device="cuda")
    peak[0, total // 3] = 1
    for score in (outliers, walk, steps, -steps, peak, -peak):
        for k in (512, 1024):
            check_topk(score, whole, k)


@pytest.mark.parametrize("total", [1, 2, 511, 512, 513, 1024, 1152, 1537, 2047, 2048, 2049, 4097])
def test_topk_of_rows_with_a_block_each(total: int) -> None:
    """Rows of every kind side by side, as a decode step of many sequences has them."""
    normal = torch.randn(12, total, device="cuda")
    rows = [
        normal,
        normal.abs() + 1,  # one sign: bins of keys
        -normal.abs(),
        torch.randint(0, 4, (4, total), device="cuda").float(),  # crowded bins
        normal[:3].exp().exp(),
        normal[:3] * 1e-40,
        torch.full((1, total), 2.5, device="cuda"),
        (torch.arange(total, device="cuda") == total // 3)[None].float(),
        torch.where(normal[:2] > 0, torch.nan, normal[:2]),
        torch.where(normal[:2] > 1, torch.inf, -torch.inf),
    ]
    score = torch.cat(rows)
    n = len(score)
    for visible in (
        torch.full((n,), total, device="cuda"),
        torch.randint(0, total + 1, (n,), device="cuda"),
    ):
        for k in (512, 1024, 7):
            check_topk(score, visible, k)


@pytest.mark.parametrize("n", [1, 4, 8, 9, 16, 17, 33, 64, 67, 200])
def test_topk_of_many_rows(n: int) -> None:
    for total in (1000, 1500, 3000, 9000, 16384, 17000, 20480, 20481, 30000):
        score = torch.randn(n, total, device="cuda")
        check_topk(score, torch.randint(0, total + 1, (n,), device="cuda"), 512)


def test_topk_of_odd_values() -> None:
    score = torch.randn(3, 5000, device="cuda")
    score[0, ::3], score[0, 1::3] = -0.0, 0.0
    score[1, [7, 3, 4000]] = torch.nan
    score[1, 50], score[1, 60] = torch.inf, -torch.inf
    score[2] = torch.linspace(-1, 1, 5000, device="cuda") * 1e-40  # subnormal
    check_topk(score, torch.full((3,), 5000, device="cuda"), 512)
    for view in views(score):
        judge("index_topk", view, torch.full((3,), 5000, device="cuda"), k=512)


@pytest.mark.parametrize("total", [600, 1500, 4000, 16000, 40000])
def test_topk_with_nan_and_infinity(total: int) -> None:
    """More of them than are wanted too: NaN before infinity, each in index order."""
    for count in (1, 400, 600):
        score = torch.randn(4, total, device="cuda")
        score[0, :count], score[1, -count:], score[2, ::2] = torch.nan, torch.inf, -torch.inf
        score[3, :count:2], score[3, 1:count:2] = torch.inf, torch.nan
        check_topk(score, torch.full((4,), total, device="cuda"), 512)


def test_topk_repeats_are_identical() -> None:
    score = torch.randint(0, 50, (1, 200000), device="cuda").float()
    same_each_time("index_topk", score, torch.tensor([200000], device="cuda"), k=512)


# ------------------------------------------------------------------------------ compressor


def state_of(step: Step, ratio: int, width: int, ape: Tensor) -> tuple[Tensor, Tensor]:
    """States as they are after the tokens before this step, filled with random tokens."""
    slots = 2 * ratio if ratio == 4 else ratio
    kv = torch.zeros(len(step.starts), slots, width, device="cuda")
    score = torch.full_like(kv, -torch.inf)
    for b, start in enumerate(step.starts):
        first = ratio if ratio == 4 else 0
        filled = start % ratio
        spans = [(first, first + filled)]
        if ratio == 4 and start >= ratio:
            spans.append((0, ratio))
        for begin, end in spans:
            kv[b, begin:end] = torch.randn(end - begin, width, device="cuda")
            score[b, begin:end] = (
                torch.randn(end - begin, width, device="cuda") + ape[: end - begin]
            )
    return kv, score


STEPS = [
    ((0, 1),),
    ((3, 1), (4, 1), (127, 1), (128, 1), (1023, 1)),
    ((0, 300),),
    ((5, 3), (0, 1), (126, 131), (2, 2), (250, 6)),
    ((0, 4), (1, 7), (4, 128), (127, 1)),
    ((1000, 1000), (7, 129)),
]


@pytest.mark.parametrize("pieces", STEPS)
@pytest.mark.parametrize("ratio, dim", [(4, 512), (4, 128), (128, 512), (4, 33)])
def test_compressor(pieces: tuple[tuple[int, int], ...], ratio: int, dim: int) -> None:
    step = step_of(*pieces)
    n, width = sum(step.lengths), 2 * dim if ratio == 4 else dim
    ape = torch.randn(ratio, width, device="cuda")
    kv, score = torch.randn(n, width, device="cuda"), torch.randn(n, width, device="cuda") * 3
    args = (kv, score, *state_of(step, ratio, width, ape), step)
    judge("compressor", *args, ape=ape)
    wide = [
        torch.cat((x, x), dim=-1)[..., :width] for x in args[:4]
    ]  # states written through views
    judge("compressor", *wide, step, ape=ape)
    same_each_time("compressor", *args, repeats=10, ape=ape)


def test_compressor_token_by_token_equals_at_once() -> None:
    whole, ape = step_of((0, 261)), torch.randn(4, 256, device="cuda")
    kv, score = torch.randn(261, 256, device="cuda"), torch.randn(261, 256, device="cuda")
    state = state_of(whole, 4, 256, ape)
    at_once = kernel("compressor", kv, score, *[s.clone() for s in state], whole, ape=ape)
    pieces = []
    for i in range(261):
        one = slice(i, i + 1)
        pieces.append(
            kernel("compressor", kv[one], score[one], *state, step_of((i, 1)), ape=ape)["pooled"]
        )
    assert torch.equal(torch.cat(pieces), at_once["pooled"])
    assert torch.equal(state[0], at_once["kv_state"])
    assert torch.equal(state[1], at_once["score_state"])
