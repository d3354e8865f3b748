"""FlashMLA (deepseek-ai) as a peer of sparse attention: decode over 584-byte fp8 entries, prefill over bfloat16 rows.

Its plan of splits, computed once a step and shared by all layers, is not in the time; the combine is.
"""

from __future__ import annotations

from ctypes import c_int64
from functools import cache

import torch
from peer_library import BF16, CUDA, Peer, error, launch
from torch import Tensor

PAGE, DATA, ENTRY, DIM, PLAIN = 64, 576, 584, 512, 448
PAGE_BYTES = -(-PAGE * ENTRY // DATA) * DATA  # a page starts at a multiple of 576 bytes
SCALE = DIM**-0.5


@cache
def pool(pages: int) -> Tensor:
    """Random entries uint8 [pages, bytes]: all data of a page first, behind it the scales."""
    found = torch.zeros(pages, PAGE_BYTES, device=CUDA, dtype=torch.uint8)
    data = found[:, : PAGE * DATA].unflatten(1, (PAGE, DATA))
    data[..., :PLAIN] = (
        torch.randn(pages, PAGE, PLAIN, device=CUDA, dtype=BF16)
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
    )
    rope = torch.randn(pages, PAGE, DIM - PLAIN, device=CUDA, dtype=BF16)
    data[..., PLAIN:] = rope.view(torch.uint8)
    scales = found[:, PAGE * DATA : PAGE * ENTRY].unflatten(1, (PAGE, ENTRY - DATA))
    scales[..., : PLAIN // 64] = torch.randint(
        125, 129, scales[..., : PLAIN // 64].shape, device=CUDA, dtype=torch.uint8
    )
    return found


def rows_of(pages: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [n] as float32 [n, 512]."""
    page, slot = pages[index.long() // PAGE], (index % PAGE).long()
    one = torch.arange(len(index), device=CUDA)
    data = page[:, : PAGE * DATA].unflatten(1, (PAGE, DATA))[one, slot]
    scales = page[:, PAGE * DATA : PAGE * ENTRY].unflatten(1, (PAGE, ENTRY - DATA))[one, slot]
    plain = data[:, :PLAIN].contiguous().view(torch.float8_e4m3fn).float().view(-1, PLAIN // 64, 64)
    scale = torch.exp2(scales[:, : PLAIN // 64].float() - 127)
    rope = data[:, PLAIN:].contiguous().view(BF16).float()
    return torch.cat(((plain * scale[..., None]).flatten(1), rope), 1)


def attend(q: Tensor, keys: Tensor, sink: Tensor) -> Tensor:
    """One query [heads, 512] over keys [n, 512], float32."""
    logits = q.float() @ keys.T * SCALE
    weights = torch.cat((logits, sink[:, None]), 1).softmax(1)[:, :-1]
    return weights @ keys


def indices(n: int, width: int, pages: int) -> Tensor:
    return torch.randint(0, pages * PAGE, (n, width), device=CUDA, dtype=torch.int32)


def decode(n: int, heads: int, widths: tuple[int, int], rows: tuple[int, int]) -> Peer:
    """n queries over `widths` entries each of two pools with that many `rows`."""
    pools = [pool(-(-count // PAGE)) for count in rows]
    index = [indices(n, w, len(p)) for w, p in zip(widths, pools, strict=True)]
    q = torch.randn(n, heads, DIM, device=CUDA, dtype=BF16)
    sink, out = torch.randn(heads, device=CUDA), torch.empty_like(q)
    parts = torch.cuda.get_device_properties(CUDA).multi_processor_count // (heads // 64)
    plan = torch.zeros(parts, 8, device=CUDA, dtype=torch.int32)
    splits = torch.zeros(n + 1, device=CUDA, dtype=torch.int32)
    launch("flashmla", "flashmla_plan", n, *widths, parts, plan, splits)()
    lse = torch.empty(n, heads, device=CUDA)
    partial = torch.empty(n + parts, heads, DIM, device=CUDA)
    partial_lse = torch.empty(n + parts, heads, device=CUDA)
    shape = (n, heads, *widths, len(pools[0]), PAGE, len(pools[1]), PAGE)
    strides = (c_int64(PAGE_BYTES), c_int64(PAGE_BYTES))
    inputs = (q, pools[0], index[0], pools[1], index[1], sink)
    buffers = (out, lse, partial, partial_lse, plan, splits)
    call = launch("flashmla", "flashmla_decode", *inputs, *buffers, *shape, *strides, parts, SCALE)

    def check() -> float:
        tokens = sorted({0, n // 2, n - 1})
        want = [
            attend(
                q[t], torch.cat([rows_of(p, i[t]) for p, i in zip(pools, index, strict=True)]), sink
            )
            for t in tokens
        ]
        return error(out[tokens], torch.stack(want), 0.01)

    return call, check


def prefill(n: int, heads: int, width: int, rows: int) -> Peer:
    """n queries over `width` random rows each of one bfloat16 pool."""
    keys = torch.randn(rows, DIM, device=CUDA, dtype=BF16)
    index = torch.randint(0, rows, (n, width), device=CUDA, dtype=torch.int32)
    q = torch.randn(n, heads, DIM, device=CUDA, dtype=BF16)
    sink, out = torch.randn(heads, device=CUDA), torch.empty_like(q)
    most, lse = torch.empty(n, heads, device=CUDA), torch.empty(n, heads, device=CUDA)
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    inputs, results = (q, keys, index, sink), (out, most, lse)
    shape = (n, rows, heads, width, SCALE, processors)
    call = launch("flashmla", "flashmla_prefill", *inputs, *results, *shape)

    def check() -> float:
        tokens = [0, n // 2, n - 1]
        want = [attend(q[t], keys[index[t].long()].float(), sink) for t in tokens]
        return error(out[tokens], torch.stack(want), 0.01)

    return call, check
