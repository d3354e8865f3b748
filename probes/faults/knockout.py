"""Parts of the model knocked out, to see what each is for; not bugs, and not scored as such

`why` says what theory expects of the demo's answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.ops.experts import ExpertBank
from dsv4_bench.probes.faults.base import fault, right
from dsv4_bench.probes.faults.experts import forward, routed

attention = right("attention")
hc_post = right("hc_post")
index_topk = right("index_topk")
Result = tuple[Tensor, Tensor]


def _knocked_out(op: str, sites: str, why: str) -> Any:
    return fault(op=op, sites=sites, kinds="unexplained", why=why, knockout=True)


@_knocked_out(
    "attention", "*/attn/core", "recall beyond the window of 128 is lost, within it is not"
)
def without_entries(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Any, entry_index: Any, **params: Any
) -> Result:
    """No layer attends to compressed entries."""
    return attention(q, window, window_index, None, None, **params)


@_knocked_out(
    "index_topk", "*/attn/index/topk", "recall beyond the window is lost where selection decides"
)
def without_indexer(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """CSA layers keep the newest entries instead of those with the best scores."""
    newest = torch.arange(score.shape[1], device=score.device).to(score).expand(len(score), -1)
    hidden = newest >= visible[:, None]
    return index_topk(newest.masked_fill(hidden, -torch.inf), visible, k=k)


@_knocked_out("index_topk", "*/attn/index/topk", "recall stays: the indexer only saves work")
def with_every_entry(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """CSA layers keep every visible entry."""
    return index_topk(score, visible, k=score.shape[1])


@_knocked_out("index_topk", "*/attn/index/topk", "recall beyond the window needs one entry a head")
def with_one_entry(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """CSA layers keep the one best entry."""
    index = index_topk(score, visible, k=k).clone()
    index[:, 1:] = -1
    return index


@_knocked_out("gate", "*/ffn/gate", "the loss rises: half of what experts add is another's")
def with_one_expert(x: Tensor, tokens: Tensor, *, scale: float, **more: Any) -> Any:
    """Every token uses its first expert only, with the whole weight."""
    routing, chosen, scores = right("gate")(x, tokens, scale=scale, **more)
    alone = torch.zeros_like(routing)
    alone[:, 0] = scale
    return alone, chosen, scores


@_knocked_out("attention", "*/attn/core", "what is local is lost: copying, text, recall within it")
def without_window(
    q: Tensor, window: Tensor, window_index: Tensor, *rest: Any, **params: Any
) -> Result:
    """Of the window a query sees its own token only."""
    only = torch.full_like(window_index, -1)
    only[:, -1] = window_index[:, -1]
    return attention(q, window, only, *rest, **params)


@_knocked_out("attention", "*/attn/core", "heads can no longer attend to nothing: the loss rises")
def without_sink(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """The sink is left out of every softmax."""
    return attention(q, *args, sink=torch.full_like(sink, -torch.inf), scale=scale)


def _without_stream(stream: int) -> None:
    def knocked(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = hc_post(y, x, post, comb).clone()
        mixed[:, stream] = 0
        return mixed

    knocked.__name__ = f"without_stream_{stream}"
    knocked.__doc__ = f"Residual stream {stream} is set to zero after every sublayer."
    _knocked_out("hc_post", "*/hc_post", "the loss and every recall suffer; streams differ in use")(
        knocked
    )


for _stream in range(4):
    _without_stream(_stream)


def _without_expert(number: int) -> None:
    def knocked(
        x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
    ) -> Tensor:
        def one(expert: int, *rest: Any) -> Tensor:
            y = forward(rest[1], rest[0], limit, rest[2])
            return torch.zeros_like(y) if expert == number else y

        return routed(x, routing, experts, bank, one)

    knocked.__name__ = f"without_expert_{number}"
    knocked.__doc__ = f"Expert {number} gives nothing, in every layer."
    _knocked_out(
        "experts", "*/ffn/experts", "the loss rises a little, recall hardly: 2 of 8 a token"
    )(knocked)


for _expert in (0, 3):
    _without_expert(_expert)
