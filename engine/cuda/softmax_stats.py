"""Where the mass of attention weights goes: recomputed by the GPU from q, keys and the op's own lse."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import F, Library, N, P, dense

PROBE_SOFTMAX = Library(
    "probe_softmax", {"probe_softmax": (P, P, P, P, N, P, P, N, P, P, N, N, N, N, F, P, P)}
)
# As in probe_softmax_sm90.cu; _SHARES is what a token's blocks leave for the last launch, in bytes.
_MOST_HEADS, MOST_SAMPLES, _WIDTH, _SHARES = 128, 8, 8, 40 * 2064

# Of every sampled token, what `softmax_stats` returns: sums over the heads, the largest weight, and how
# far the sum of a head's weights lies above 1 at most, and below. The sink's weight is summed over tokens
# which the samples share among them, so that all of them together are in the sum over the samples.
FIELDS = ("sinks", "window", "entries", "entropy", "largest", "over", "under")


def softmax_stats(
    q: Tensor,
    lse: Tensor,
    sink: Tensor,
    sample: Sequence[int],
    pools: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None],
    scale: float,
) -> Tensor | None:
    """FIELDS as float64 [s, 7] on the device; None for what the kernel does not take.

    q [n, h, hd] bfloat16; lse [n, h]; sink [h]; sample: up to 8 tokens; pools: keys [r, hd] bfloat16 and
    index [n, k], -1 for none, of the window and, if there are any, the entries. Nobody waits.
    """
    n, heads, dim = q.shape
    keys = [pool[0] for pool in pools if pool is not None]
    if any(tensor.dtype != torch.bfloat16 for tensor in (q, *keys)):
        return None
    if dim % 8 or heads > _MOST_HEADS or not 1 <= len(sample) <= MOST_SAMPLES:
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
    out = q.new_empty((len(sample), _WIDTH), dtype=torch.float64)
    scratch = q.new_empty((len(sample), _SHARES), dtype=torch.uint8)
    tokens = (ctypes.c_int64 * len(sample))(*sample)
    PROBE_SOFTMAX.call(
        "probe_softmax",
        q,
        *(q.data_ptr(), lse.data_ptr(), sink.data_ptr()),
        *(ctypes.addressof(tokens), len(sample)),
        *addresses[0],
        *addresses[1],
        *(n, heads, dim, scale, scratch.data_ptr(), out.data_ptr()),
    )
    return out[:, : len(FIELDS)]
