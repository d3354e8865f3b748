"""The `sm90` implementation of the KV compressor, alone and with what follows it in a decode step.

The contract is that of the reference in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P, floats, sm90, wrong
from dsv4_bench.engine.step import Step

_OVERLAP_RATIO, _WIDEST = 4, 512  # of compressed_entry
_WINDOWS = (P, P, P, P, P, P, N, N, N, I)  # kv to overlap
COMPRESSOR = Library(
    "compressor",
    {
        "compressor": (*_WINDOWS, N, I, P),
        "compressed_entry": (*_WINDOWS, P, I, F, P, P, N, P, N, P, N, P, P, P),
    },
)


@sm90("compressor", COMPRESSOR)
def compressor(
    kv: Tensor,
    score: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    step: Step,
    *,
    ape: Tensor,
) -> Tensor:
    op = "compressor"
    (ratio, width), (batch, slots, _) = ape.shape, kv_state.shape
    tokens = (sum(step.lengths), width)
    state = (len(step.lengths), slots, width)
    if kv.shape != tokens or score.shape != tokens or slots not in (ratio, 2 * ratio):
        wrong(op, f"kv {list(kv.shape)}, score {list(score.shape)}, ape {list(ape.shape)}")
    if kv_state.shape != state or score_state.shape != state:
        wrong(op, f"states {list(kv_state.shape)}, {list(score_state.shape)}, not {list(state)}")
    kv, score, ape = floats(op, kv), floats(op, score), floats(op, ape)
    states = [_writable(op, kv_state), _writable(op, score_state)]
    windows = step.closed(ratio)
    overlap = slots == 2 * ratio
    pooled = kv.new_empty(sum(windows), width // 2 if overlap else width)
    sequences = step.sequence_table(ratio)
    COMPRESSOR.call(
        op,
        kv,
        kv.data_ptr(),
        score.data_ptr(),
        ape.data_ptr(),
        states[0].data_ptr(),
        states[1].data_ptr(),
        sequences.data_ptr(),
        batch,
        ratio,
        width,
        overlap,
        max(windows),
        step.is_decode,
        pooled.data_ptr(),
    )
    for given, written in zip((kv_state, score_state), states, strict=True):
        if written is not given:
            given.copy_(written)
    return pooled


def entry_fits(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> bool:
    """Whether `compressed_entry` takes these arguments of op compressor, as far as they go."""
    (ratio, width), slots = ape.shape, kv_state.shape[1]
    overlap = slots == 2 * ratio
    dim = width // 2 if overlap else width
    given = (kv, score, kv_state, score_state, ape)
    return (
        step.padded
        and step.is_decode
        and (slots == ratio or (overlap and ratio == _OVERLAP_RATIO))
        and dim <= _WIDEST
        and dim % 8 == 0
        and kv.shape == score.shape == (len(step.lengths), width)
        and all(t.is_cuda and t.is_contiguous() and t.dtype == torch.float32 for t in given)
    )


def compressed_entry(
    kv: Tensor,
    score: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    step: Step,
    *,
    ape: Tensor,
    weight: Tensor | None,
    eps: float,
    positions: Tensor,
    freqs: Tensor,
    slots: Tensor,
    entries: Tensor,
    outs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """`compressor`, rounding to bfloat16, rms_norm, rope and cache_write in one launch, to the last bit.

    For arguments that `entry_fits`; `weight` [dim] float32 or bfloat16, `positions` and `slots` [b] int64,
    `freqs` [half] float32, `entries` [rows, dim] bfloat16. `outs` [b, dim], the first float32, get what the
    ops return before the entry is written.
    """
    op = "compressed_entry"
    ratio, width = ape.shape
    COMPRESSOR.call(
        op,
        kv,
        kv.data_ptr(),
        score.data_ptr(),
        ape.data_ptr(),
        kv_state.data_ptr(),
        score_state.data_ptr(),
        step.sequence_table(ratio).data_ptr(),
        len(step.lengths),
        ratio,
        width,
        kv_state.shape[1] == 2 * ratio,
        None if weight is None else weight.data_ptr(),
        0 if weight is None else DTYPES[weight.dtype],
        eps,
        positions.data_ptr(),
        freqs.data_ptr(),
        freqs.numel(),
        slots.data_ptr(),
        len(entries),
        entries.data_ptr(),
        entries.stride(0),
        *((None,) * 3 if outs is None else (out.data_ptr() for out in outs)),
    )


def _writable(op: str, state: Tensor) -> Tensor:
    """A float32 argument that is written in place; a copy to be written back if not contiguous."""
    if state.dtype != torch.float32 or not state.is_cuda:
        wrong(op, f"the state is float32 in GPU memory, not {state.dtype} on {state.device}")
    return state if state.is_contiguous() else state.contiguous()
