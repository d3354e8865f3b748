"""The KV compressor: gated pooling of 4 (overlapping) or 128 tokens into one entry.

Source: the release, Compressor. It lacks chunked prefill; the state kept here is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.registry import op
from dsv4_bench.engine.step import Step


@op(
    "compressor",
    outputs=("pooled",),
    mutates=("kv_state", "score_state"),
    nonfinite=("score_state",),
)
def compressor(
    kv: Tensor,
    score: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    step: Step,
    *,
    ape: Tensor,
) -> Tensor:
    """Pool every window that closes in this step, and keep the open one in the state.

    kv, score [n, w] float32 (score without ape); ape [ratio, w] float32. Ratio 128: w = d, an
    entry is a per-channel softmax(score + ape)-weighted sum of its 128 tokens. Ratio 4: w = 2d and
    an entry pools 8 slots: the first half of w of the previous window's 4 tokens, the second half
    of its own; before the first window those are kv 0, score -inf.

    kv_state, score_state [b, ratio or 2*ratio, w] float32, in place: slots [0, ratio) the previous
    window (ratio 4 only), then the open window, slot = position % ratio; score is kept with ape
    added; unused slots hold 0 and -inf. Returns pooled [m, d] float32, sequence by sequence; of a
    padded step [b, d], with zeros for a sequence whose window stays open.
    """
    ratio, width = ape.shape
    overlap = kv_state.shape[1] == 2 * ratio
    pooled = []
    score = score + ape[step.positions % ratio]
    for b, (start, rows) in enumerate(zip(step.starts, step.rows(), strict=True)):
        filled = start % ratio  # tokens of the open window that came in earlier steps
        current = slice(ratio, 2 * ratio) if overlap else slice(0, ratio)
        open_kv, open_score = kv_state[b, current][:filled], score_state[b, current][:filled]
        all_kv = torch.cat((open_kv, kv[rows]))
        all_score = torch.cat((open_score, score[rows]))
        windows = all_kv.shape[0] // ratio
        closed_kv = all_kv[: windows * ratio].view(windows, ratio, width)
        closed_score = all_score[: windows * ratio].view(windows, ratio, width)
        if overlap:
            d = width // 2
            before_kv = torch.cat((kv_state[b : b + 1, :ratio], closed_kv))
            before_score = torch.cat((score_state[b : b + 1, :ratio], closed_score))
            pool_kv = torch.cat((before_kv[:-1, :, :d], closed_kv[:, :, d:]), dim=1)
            pool_score = torch.cat((before_score[:-1, :, :d], closed_score[:, :, d:]), dim=1)
            kv_state[b, :ratio] = before_kv[-1]
            score_state[b, :ratio] = before_score[-1]
        else:
            pool_kv, pool_score = closed_kv, closed_score
        pooled.append((pool_score.softmax(1) * pool_kv).sum(1))  # [windows, d]
        if step.padded and not windows:
            pooled.append(kv.new_zeros(1, pooled[-1].shape[1]))
        rest = all_kv.shape[0] - windows * ratio
        kv_state[b, current] = 0
        score_state[b, current] = -torch.inf
        kv_state[b, current][:rest] = all_kv[windows * ratio :]
        score_state[b, current][:rest] = all_score[windows * ratio :]
    return torch.cat(pooled)
