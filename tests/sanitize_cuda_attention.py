"""Cases for compute-sanitizer: attention over both kinds of pools, with ragged ends and -1 indices. See sanitize.py."""

from __future__ import annotations

from functools import partial

import torch
from sanitize_cuda import BF16, F32, randn, run

from dsv4_bench.engine.cuda.attention import attention_rope
from dsv4_bench.engine.kv_entry import pack, packed_bytes

# tokens, heads, width of the window, selected entries: 16 and 32 heads a CTA and a cluster a token; two
# CTAs that join; a second kernel that combines; one CTA for several tokens; clusters for the last tokens,
# beside the others.
FEW = ((1, 64, 128, 200), (3, 20, 65, 0), (12, 64, 128, 200))
TILES = ((20, 64, 128, 320), (1, 64, 128, 2100), (170, 20, 65, 1), (136, 20, 65, 1))
ROWS = 300  # of a pool


def indices(n: int, width: int) -> torch.Tensor:
    return torch.randint(-1, ROWS, (n, width), dtype=torch.int32).cuda()


def pool(dim: int, dtype: torch.dtype, packed: bool) -> torch.Tensor:
    rows = torch.randn(ROWS, dim)
    return pack(rows, packed_bytes(dim, 64)).cuda() if packed else rows.to(dtype).cuda()


def attention(cases: tuple[tuple[int, int, int, int], ...], packed: bool) -> None:
    for n, heads, window, selected in cases:
        q, keys = randn(n, heads, 512, dtype=BF16), [pool(512, BF16, packed) for _ in range(2)]
        entries = (keys[1], indices(n, selected)) if selected else (None, None)
        sink = {"sink": randn(heads), "scale": 0.04}
        run("attention", q, keys[0], indices(n, window), *entries, **sink)
        if cases is FEW:
            where = (torch.arange(n) * 70_001).cuda()
            args = (q, keys[0], indices(n, window), *entries, where)
            outs = torch.empty_like(q), randn(n, heads)
            attention_rope(*args, **sink, freqs=randn(32), outs=outs)


def any_width() -> None:
    for dim, dtype in ((72, F32), (128, BF16)):
        for packed in (False, True):
            q, keys = randn(2, 3, dim, dtype=dtype), pool(dim, dtype, packed)
            both = keys, indices(2, 5), keys, indices(2, 7)
            run("attention", q, *both, sink=randn(3), scale=0.04)


def few() -> None:
    attention(FEW, False)
    attention(FEW, True)
    any_width()


def packed_rows() -> None:
    entries = pool(512, BF16, True)
    for dtype in (BF16, F32):
        rows, slots = randn(37, 512, dtype=dtype), torch.randperm(ROWS)[:37].cuda()
        run("cache_write", rows, slots, entries)
        run("gather_swa", entries[:7], rows)


def packed() -> None:
    packed_rows()
    attention(TILES, True)


PARTS = {
    "attention_tile": (partial(attention, TILES, False), ("attention",)),
    "attention_packed": (packed, ("attention", "rows")),
    "attention_few": (few, ("attention",)),
}
