"""Where the mass of attention weights goes, in one launch: recomputed from q, keys and the op's own lse."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P, dense

PROBE_SOFTMAX = Library(
    "probe_softmax",
    {"probe_softmax": (P, I, P, P, P, N, P, P, N, P, P, N, I, N, N, N, F, P, P, P)},
)
_KEYS, _HEADS, _MOST_DIM = 16, 8, 512  # of a block, of a head; as in probe_softmax_sm90.cu

# What `softmax_stats` returns, in this order: means over sampled tokens and heads, but the sink's, which
# is over all tokens; `row_sum` is the one that is furthest from 1.
FIELDS = (
    "sink_mass", "window_mass", "entry_mass", "entropy", "max_weight", "padding_mass", "row_sum",
)  # fmt: skip


def softmax_stats(
    q: Tensor,
    lse: Tensor,
    sink: Tensor,
    sample: Tensor,
    pools: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None],
    scale: float,
) -> Tensor | None:
    """FIELDS as float64 [7] on the device; None for what the kernel does not take.

    q [n, h, hd]; lse [n, h]; sink [h]; sample [s] int64 tokens; pools: keys [r, hd] and index [n, k],
    -1 for none, of the window and, if there are any, the entries. Nobody waits.
    """
    keys = [pool[0] for pool in pools if pool is not None]
    n, heads, dim = q.shape
    known = all(key.dtype == keys[0].dtype and key.dtype in DTYPES for key in keys)
    if not known or q.dtype not in DTYPES or dim % 8 or dim > _MOST_DIM or not n:
        return None
    q, lse, sink = dense(q), dense(lse.float()), dense(sink.float())
    kept: list[Tensor] = []
    addresses: list[tuple[int | None, int | None, int]] = []
    for pool in pools:
        if pool is None:
            addresses.append((None, None, 0))
            continue
        rows, index = dense(pool[0]), dense(pool[1].int())
        kept += [rows, index]
        addresses.append((rows.data_ptr(), index.data_ptr(), index.shape[1]))
    chunks = sum(-(-width // _KEYS) for _, _, width in addresses)
    parts = q.new_empty((len(sample), heads, chunks + 1, 4), dtype=torch.float32)
    groups = len(sample) * -(-heads // _HEADS)
    arrived = torch.zeros(1 + groups, dtype=torch.int32, device=q.device)
    out = q.new_empty(8, dtype=torch.float64)
    PROBE_SOFTMAX.call(
        "probe_softmax",
        q,
        *(q.data_ptr(), DTYPES[q.dtype], lse.data_ptr(), sink.data_ptr()),
        *(sample.data_ptr(), len(sample)),
        *addresses[0],
        *addresses[1],
        *(DTYPES[keys[0].dtype], n, heads, dim, scale),
        *(parts.data_ptr(), arrived.data_ptr(), out.data_ptr()),
    )
    return out[: len(FIELDS)]
