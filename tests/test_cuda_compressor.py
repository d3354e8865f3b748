"""The compressor of one token a sequence, alone and with norm, rope and write. Skipped where there is no H100 or H200.

tests/test_cuda_indexer.py judges the op against float64; here the kernels have to agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.cuda.compressor import entry_fits
from dsv4_bench.engine.cuda.fused import KINDS, Chain, entry
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS, Site
from dsv4_bench.engine.step import Step

pytestmark = pytest.mark.gpu
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
ENTRIES = [(4, 512), (4, 128), (128, 512), (4, 64), (128, 136)]  # ratio, width of an entry
STARTS = (0, 2, 3, 6, 127, 128, 1023, 65_535)
CAPACITY = 20_000


def states(ratio: int, dim: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random states; the first sequence has nothing before its window yet."""
    width, slots = (2 * dim, 2 * ratio) if ratio == 4 else (dim, ratio)
    kv = torch.randn(batch, slots, width, device=CUDA)
    score = torch.randn(batch, slots, width, device=CUDA) * 3
    if ratio == 4:
        kv[0, :ratio], score[0, :ratio] = 0, -torch.inf
    return kv, score


def tokens(ratio: int, dim: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    width = 2 * dim if ratio == 4 else dim
    kv, score = torch.randn(n, width, device=CUDA), torch.randn(n, width, device=CUDA) * 3
    return kv, score, torch.randn(ratio, width, device=CUDA)


@pytest.mark.parametrize("ratio, dim", [*ENTRIES, (4, 33)])
def test_one_token_has_the_bits_of_the_kernel_for_many(ratio: int, dim: int) -> None:
    """The same sequences, once beside one that brings three tokens."""
    torch.manual_seed(2)
    run, count = IMPLEMENTATIONS["compressor"]["sm90"].function, len(STARTS)
    kv, score, ape = tokens(ratio, dim, count + 3)
    before = states(ratio, dim, count + 1)
    ones, many = [s[:count].clone() for s in before], [s.clone() for s in before]
    ids = torch.zeros(count + 3, dtype=torch.int64, device=CUDA)
    mixed = Step(ids, (*STARTS, 0), (1,) * count + (3,), 128)
    wanted = run(kv, score, *many, mixed, ape=ape)
    single = Step(ids[:count], STARTS, (1,) * count, 128)
    found = run(kv[:count], score[:count], *ones, single, ape=ape)
    assert len(found) == sum(start % ratio == ratio - 1 for start in STARTS) > 0
    assert torch.equal(found, wanted[: len(found)]) and not found.isnan().any()
    for mine, theirs in zip(ones, many, strict=True):
        assert torch.equal(mine, theirs[:count])


def sites(ratio: int, dim: int, ape: Tensor, weight: Tensor | None) -> list[Site]:
    params: list[tuple[str, str, dict[str, Any]]] = [
        ("pool", "compressor", {"ape": ape}),
        ("norm", "rms_norm", {"weight": weight, "eps": 1e-6}),
        ("rope", "rope", {"freqs": torch.rand(dim // 32 * 4, device=CUDA), "inverse": False}),
        ("write", "cache_write", {}),
    ]
    found = [Site(f"L0/attn/compressor/{name}", OPS[op], p, 0) for name, op, p in params]
    for site in found:
        site.use(IMPLEMENTATIONS[site.op]["sm90"])
    return found


@pytest.mark.parametrize("ratio, dim", ENTRIES)
@pytest.mark.parametrize("dtype", [None, torch.float32, BF16])
def test_an_entry_in_one_launch_has_the_bits_of_the_four(
    ratio: int, dim: int, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(4)
    batch = len(STARTS)
    positions = torch.tensor(STARTS, device=CUDA)
    ids = torch.zeros(batch, dtype=torch.int64, device=CUDA)
    step = FixedStep(ids, positions, 128, 65_664, {ratio: CAPACITY})
    kv, score, ape = tokens(ratio, dim, batch)
    weight = None if dtype is None else torch.randn(dim, device=CUDA).to(dtype)
    before = states(ratio, dim, batch)
    pool, norm, rope, write = sites(ratio, dim, ape, weight)
    places, slots = step.new_entries(ratio, CAPACITY)
    one_by_one, fused = ([s.clone() for s in before] for _ in range(2))
    wanted = torch.full((batch * CAPACITY, dim), torch.nan, device=CUDA, dtype=BF16)
    found = wanted.clone()
    pooled = pool(kv, score, *one_by_one, step)
    normed = norm(pooled.to(BF16))
    turned = rope(normed, places)
    write(turned, slots, wanted)
    later = torch.full((batch, dim), torch.nan, device=CUDA, dtype=BF16)
    args = (kv, score, *fused, step)
    assert entry_fits(*args, ape=ape)
    chain = [args, (later,), (later, places), (later, slots, found)]
    entry(Chain(KINDS[2], [], [pool, norm, rope, write], chain))
    torch.cuda.synchronize()
    closed = sum(start % ratio == ratio - 1 for start in STARTS)
    assert int((~found.isnan().all(-1)).sum()) == closed > 0
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    for mine, theirs in zip(fused, one_by_one, strict=True):
        assert torch.equal(mine, theirs)
    first = found.clone()
    seen = [torch.full_like(later, torch.nan) for _ in range(3)]
    observed = Chain(KINDS[2], [], [pool, norm, rope, write], chain, seen, observed=True)
    for state, value in zip(fused, before, strict=True):
        state.copy_(value)
    entry(observed)
    assert torch.equal(found.view(torch.int16), first.view(torch.int16))
    for mine, theirs in zip(observed.results, (pooled, normed, turned), strict=True):
        assert torch.equal(mine, theirs)  # zeros where the window stays open
    for _ in range(20):
        for state, value in zip(fused, before, strict=True):
            state.copy_(value)
        entry(Chain(KINDS[2], [], [pool, norm, rope, write], chain))
        assert torch.equal(found.view(torch.int16), first.view(torch.int16))


def test_what_one_launch_does_not_take() -> None:
    """Then the four run one by one."""
    ids = torch.zeros(1, dtype=torch.int64, device=CUDA)
    step = FixedStep(ids, torch.tensor([3], device=CUDA), 128, 256, {4: 64})
    kv, score, ape = tokens(4, 64, 1)
    args = (kv, score, *states(4, 64, 1), step)
    assert entry_fits(*args, ape=ape)
    assert not entry_fits(*args[:4], Step(ids, (3,), (1,), 128), ape=ape)  # no row while open
    assert not entry_fits(kv.double(), *args[1:], ape=ape)
    other = torch.zeros(64, 64, device=CUDA)  # a cache in float32
    pool, norm, rope, write = sites(4, 64, ape, None)
    places, slots = step.new_entries(4, 64)
    later = torch.full((1, 64), torch.nan, device=CUDA, dtype=BF16)
    kept = [s.clone() for s in args[2:4]]
    chain = [args, (later,), (later, places), (later, slots, other)]
    entry(Chain(KINDS[2], [], [pool, norm, rope, write], chain))
    wanted = rope(norm(pool(kv, score, *kept, step).to(BF16)), places)
    assert torch.equal(other[0], wanted[0].float())
