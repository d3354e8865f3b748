"""Cases for bench_cuda.py: packed KV entries beside bfloat16, in attention and cache_write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from bench_cuda import Case
from bench_cuda_attention import Arguments, attention, case, pools, randn
from torch import Tensor

from dsv4_bench.engine.kv_entry import pack

PACKED = 584


@cache
def packed_pools() -> tuple[Tensor, Tensor]:
    """`pools()` packed, a part at a time: the reference makes large intermediates."""
    first, second = (
        torch.cat([pack(part, PACKED) for part in pool.split(20_000)]) for pool in pools()
    )
    return first, second


def packed_attention(
    n: int, heads: int, widths: tuple[int, int], rows: int = 0
) -> Callable[[], Arguments]:
    """As `attention` of bench_cuda_attention, on packed pools."""
    plain = attention(n, heads, widths, rows)

    def arguments() -> Arguments:
        (q, _, index, _, entry_index), constants = plain()
        window, entries = (pool[:rows] if rows else pool for pool in packed_pools())
        return (q, window, index, entries, entry_index), constants

    return arguments


def attention_cases() -> Iterator[Case]:
    for n, peer in ((1, 13.26), (8, 15.11), (64, 43.4), (256, 86.1)):
        for kind, make in (("fp8", packed_attention), ("bf16", attention)):
            shape = f"kv {n}x64 128+512 {kind}"
            yield case("attention", shape, make(n, 64, (128, 512)), FlashMLA=peer)
    for kind, make in (("fp8", packed_attention), ("bf16", attention)):
        arguments = make(4096, 64, (128, 512), 5120)
        yield case("attention", f"kv 4096x64 128+512 of 5120 {kind}", arguments, copies=3)


def write_cases() -> Iterator[Case]:
    for m in (1, 64, 4096):
        for kind in ("fp8", "bf16"):

            def write(m: int = m, kind: str = kind) -> Arguments:
                slots = torch.randperm(150_000, device="cuda")[:m]
                pool = (packed_pools() if kind == "fp8" else pools())[0]
                return (randn(m, 512), slots, pool), {}

            yield case("cache_write", f"kv {m} rows {kind}", write, copies=48)


def cases() -> Iterator[Case]:
    torch.manual_seed(2)
    yield from attention_cases()
    yield from write_cases()
