"""Attention weights: sink mass, window against entries, entropy, mass that nobody accounts for"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.softmax_stats import (
    FIELDS,
    MOST_SAMPLES,
    PROBE_SOFTMAX,
    softmax_stats,
)
from dsv4_bench.engine.cuda.stats import available
from dsv4_bench.engine.ops.attention import gather_rows
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most, near
from dsv4_bench.probes.sampling import sample, sample_rows

_ROUNDING = 1e-3  # of a sum of float32 softmax weights over 10^4 keys, with room
_QUERIES = MOST_SAMPLES  # that are recomputed; 64 heads over 640 keys of 512 are 42 MFLOP each
_MADE = "softmax of sampled tokens"


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
        tokens, _ = _sampled(call)
        found = _fused(call, tokens)
        call.make(_MADE, _by_torch(call) if found is None else found)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        columns = zip(*call.values(_MADE), strict=True)
        found = dict(zip(FIELDS, columns, strict=True))
        rows, note = _sampled(call)
        lse, name = call.outputs["lse"], self.name
        count = len(rows) * lse.shape[1]
        yield call.reading(name, "sink_mass", sum(found["sinks"]) / lse.numel(), "share")
        for mass in ("window", "entries") if _has_entries(call) else ("window",):
            share = sum(found[mass]) / count
            reading = "entry_mass" if mass == "entries" else "window_mass"
            yield call.reading(name, reading, share, "share", sampled=note)
        entropy = sum(found["entropy"]) / count
        yield call.reading(name, "entropy", entropy, "nats", sampled=note)
        largest, over, under = (_largest(found[field]) for field in FIELDS[-3:])
        yield call.reading(name, "max_weight", largest, "share", sampled=note)
        padding, limit = under if under != under else max(under, 0.0), _ROUNDING
        within = at_most(limit)
        yield call.reading(name, "padding_mass", padding, "share", limit, within, sampled=note)
        row_sum = 1 - under if under > over or under != under else 1 + over
        off = near(1.0, limit)
        yield call.reading(
            name, "row_sum", row_sum, "share", 1.0, off, "furthest from 1", sampled=note
        )


def _sampled(call: Call) -> tuple[list[int], str]:
    return sample(len(call.outputs["lse"]), _QUERIES)


def _largest(values: Sequence[float]) -> float:
    """NaN if one is."""
    return next((value for value in values if value != value), max(values))


def _has_entries(call: Call) -> bool:
    index = call.inputs.get("entry_index")
    return index is not None and index.shape[1] > 0


def _fused(call: Call, tokens: list[int]) -> Tensor | None:
    """FIELDS [s, 7] by one launch; None where there is no kernel for these tensors."""
    a, lse = call.inputs, call.outputs["lse"]
    if not lse.is_cuda or not available(lse.device, PROBE_SOFTMAX):
        return None
    entries = (a["entries"], a["entry_index"]) if _has_entries(call) else None
    pools = (a["window"], a["window_index"]), entries
    return softmax_stats(a["q"], lse, a["sink"], tokens, pools, a["scale"])


def _by_torch(call: Call) -> Tensor:
    """The same with torch's operations, which a graph can hold; all sinks in the first row."""
    lse = call.outputs["lse"].float()
    rows, _ = sample_rows(torch.arange(len(lse), device=lse.device), _QUERIES)
    sink = torch.exp(call.inputs["sink"].float() - lse).double()  # [n, h]
    weights = attention_weights(call, rows).double()  # [s, h, keys]
    width = call.inputs["window_index"].shape[1]
    over = weights.sum(-1) + sink[rows] - 1
    found = weights.new_zeros(len(rows), len(FIELDS))
    found[0, 0] = sink.sum()
    found[:, 1] = weights[..., :width].sum((1, 2))
    found[:, 2] = weights[..., width:].sum((1, 2))
    found[:, 3] = torch.special.entr(weights).sum((1, 2))
    found[:, 4] = weights.amax((1, 2))
    found[:, 5], found[:, 6] = over.amax(1), (-over).amax(1)
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
