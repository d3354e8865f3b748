"""Attention weights: sink mass, window against entries, entropy, mass that nobody accounts for"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.softmax_stats import FIELDS, PROBE_SOFTMAX, softmax_stats
from dsv4_bench.engine.cuda.stats import available
from dsv4_bench.engine.ops.attention import gather_rows
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most, near
from dsv4_bench.probes.sampling import furthest, sample_rows

_ROUNDING = 1e-3  # of a sum of float32 softmax weights over 10^4 keys, with room
_QUERIES = 8  # as many as are recomputed; 64 heads over 640 keys of 512 are 84 MFLOP a query


@probe
class SoftmaxProbe(Probe):
    """Attention weights: where the mass goes, recomputed from q and k with the op's own lse.

    p_j = exp(scale q.k_j - lse) for valid keys, and exp(sink - lse) for the sink; they sum to 1. Keys
    that were counted and should not be (padding) show as row sums below 1: `padding_mass` is what
    valid keys and sink leave unexplained. entropy = -sum p_j ln p_j over the keys, mean over queries
    and heads, as are the masses. `sink_mass` is of all queries, the rest of a sample if its detail
    says so.
    """

    name = "softmax"
    help = "sink, window and entry mass, entropy, largest weight, mass on padding of attention"
    reads = (
        "sink_mass", "window_mass", "entry_mass", "entropy", "max_weight", "padding_mass", "row_sum",
    )  # fmt: skip
    captures = True

    def wants(self, site: Site) -> bool:
        return site.op == "attention"

    def observe(self, call: Call) -> Iterable[Reading]:
        name = self.name
        every = torch.arange(len(call.outputs["lse"]), device=call.outputs["lse"].device)
        rows, note = sample_rows(every, _QUERIES)
        found = _fused(call, rows) or _by_torch(call, rows)
        yield call.reading(name, "sink_mass", found["sink_mass"], "share")
        for mass in ("window_mass", "entry_mass"):
            if mass in found:
                yield call.reading(name, mass, found[mass], "share", sampled=note)
        yield call.reading(name, "entropy", found["entropy"], "nats", sampled=note)
        yield call.reading(name, "max_weight", found["max_weight"], "share", sampled=note)
        limit = _ROUNDING
        yield call.reading(
            name,
            "padding_mass",
            found["padding_mass"],
            "share",
            limit,
            at_most(limit),
            sampled=note,
        )
        off = near(1.0, _ROUNDING)
        yield call.reading(
            name, "row_sum", found["row_sum"], "share", 1.0, off, "furthest from 1", sampled=note
        )


def _fused(call: Call, rows: Tensor) -> dict[str, Tensor]:
    """The readings' values by one launch; nothing where there is no kernel for these tensors."""
    a, lse = call.inputs, call.outputs["lse"]
    if not lse.is_cuda or not available(lse.device, PROBE_SOFTMAX):
        return {}
    entries = None
    if a.get("entry_index") is not None and a["entry_index"].shape[1]:
        entries = a["entries"], a["entry_index"]
    pools = (a["window"], a["window_index"]), entries
    values = softmax_stats(a["q"], lse, a["sink"], rows, pools, a["scale"])
    if values is None:
        return {}
    found = dict(zip(FIELDS, values.unbind(), strict=True))
    if entries is None:
        del found["entry_mass"]
    return found


def _by_torch(call: Call, rows: Tensor) -> dict[str, Tensor]:
    """The same with torch's operations."""
    lse = call.outputs["lse"].float()
    sink = torch.exp(call.inputs["sink"].float() - lse)  # [n, h]
    weights = attention_weights(call, rows)  # [s, h, keys]
    row_sum = weights.sum(-1) + sink[rows]
    width = call.inputs["window_index"].shape[1]
    found = {
        "sink_mass": sink.mean(),
        "window_mass": weights[..., :width].sum(-1).mean(),
        "entropy": torch.special.entr(weights).sum(-1).mean(),
        "max_weight": weights.max(),
        "padding_mass": (1 - row_sum).clamp(min=0).max(),
        "row_sum": furthest(row_sum, 1.0),
    }
    if weights.shape[-1] > width:
        found["entry_mass"] = weights[..., width:].sum(-1).mean()
    return found


def attention_weights(call: Call, rows: Tensor) -> Tensor:
    """Weights [s, h, keys] of the keys of query rows [s], by the op's lse; 0 where there is no key."""
    a = call.inputs
    q = a["q"][rows].float() * a["scale"]
    logits = [_logits(q, a["window"], a["window_index"][rows])]
    if a.get("entry_index") is not None:
        logits.append(_logits(q, a["entries"], a["entry_index"][rows]))
    return torch.exp(torch.cat(logits, dim=-1) - call.outputs["lse"][rows].float()[..., None])


def _logits(q: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """q [s, h, hd], pool [r, hd] or packed, index [s, k] -> [s, h, k], -inf for index -1 whatever the
    pool holds."""
    keys = gather_rows(pool, index, q.shape[2]).to(q.dtype)  # [s, k, hd]
    return (q @ keys.transpose(1, 2)).masked_fill(index[:, None] < 0, -torch.inf)
