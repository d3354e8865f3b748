"""Launches that serve several sites, pretended on the CPU by the ops' references, and how often each ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from dsv4_bench.engine.cuda import fused
from dsv4_bench.engine.cuda.hyper import Behind
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import OPS


def pretend(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """All sites of `model` count as kernels, and all launches of fused.py but norm_rope's take everything."""
    ran: Counter[str] = Counter()

    def reference(op: str, *args: Any, **params: Any) -> Any:
        return OPS[op].reference(*args, **params)

    def hc_post_pre_norm(
        *args: Tensor,
        weight: Tensor,
        weight_eps: float,
        outs: tuple[Tensor, ...],
        parts: tuple[Tensor, Tensor] | None,
        behind: list[Behind],
        **pre: Any,
    ) -> tuple[Tensor, ...]:
        ran["streams"] += 1
        if parts is not None:
            args[0].copy_(reference("moe_sum", *parts, dtype=args[0].dtype))
        new = reference("hc_post", *args)
        u, post, comb = reference("hc_pre", new, **pre)
        for out, value in zip(outs[:2], (new, u), strict=True):
            out.copy_(value)

        def gates() -> None:
            for out, value in zip(outs[2:], (post, comb), strict=True):
                out.copy_(value)

        behind.append(Behind(gates, (post, comb), outs[2:]))
        return *outs, reference("rms_norm", u, weight=weight, eps=weight_eps)

    def attention_rope(*args: Any, sink: Any, scale: float, freqs: Tensor, outs: Any) -> Tensor:
        ran["core"] += 1
        o, lse = reference("attention", *args[:5], sink=sink, scale=scale)
        for out, value in zip(outs or (), (o, lse), strict=False):
            out.copy_(value)
        return reference("rope", o, args[5], freqs=freqs, inverse=True)

    def rope_index_score(
        q: Tensor, keys: Tensor, weights: Tensor, step: Any, freqs: Tensor, turned: Any, **by: Any
    ) -> Tensor:
        ran["scores"] += 1
        q = reference("rope", q, step.positions, freqs=freqs, inverse=False)
        if turned is not None:
            turned.copy_(q)
        return reference("index_score", q, keys, weights, step, **by)

    def linears(x: Tensor, weights: Any, out_dtypes: Any) -> list[Tensor]:
        ran["linears"] += 1
        pairs = zip(weights, out_dtypes, strict=True)
        return [reference("linear", x, weight=w, out_dtype=t) for w, t in pairs]

    for site in model.sites.values():
        monkeypatch.setattr(site.stamp, "implementation", "sm90")
    for name in ("joins_norm", "joins_rope", "joins_linears", "joins_sum"):
        monkeypatch.setattr(fused, name, lambda *_, **__: True)
    for function in (hc_post_pre_norm, attention_rope, rope_index_score, linears):
        monkeypatch.setattr(fused, function.__name__, function)
    return ran
