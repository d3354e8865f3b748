"""Faults of the router: the bias, the hash table, the scores, renormalisation"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.probes.faults.base import fault, right, rounded, with_parts

gate = right("gate")
Result = tuple[Tensor, Tensor, Tensor]


def weights_of(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Routing weights [n, k] of the chosen experts, renormalised to sum `scale`."""
    routing = scores.gather(1, chosen.long())
    return routing / routing.sum(-1, keepdim=True) * scale


def choose(
    scores: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> Result:
    """What the reference does once it has scores."""
    if tid2eid is not None:
        chosen = tid2eid[tokens].long()
    else:
        biased = scores if bias is None else scores + acc(bias)
        chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return weights_of(scores, chosen, scale), chosen.to(torch.int32), scores


@fault(
    op="gate",
    sites="L3/ffn/gate",
    kinds="constant_factor unexplained",
    why="each weight has a factor of its own, from a bias that belongs to the choice only",
    source="the bias is used to choose, not to weigh",
)
def bias_in_routing_weights(
    x: Tensor, tokens: Tensor, *, bias: Tensor | None, scale: float, **more: Any
) -> Result:
    """Routing weights come from the biased scores."""
    routing, chosen, scores = gate(x, tokens, bias=bias, scale=scale, **more)
    if bias is None:  # a hash layer
        return routing, chosen, scores
    return weights_of(scores + acc(bias), chosen, scale), chosen, scores


@fault(
    op="gate",
    sites="L4/ffn/gate",
    kinds="decision_flip",
    source="Avarok-Cybersecurity/atlas PR 186: gate.bias looked up under a wrong name",
)
def selection_without_bias(
    x: Tensor, tokens: Tensor, *, bias: Tensor | None, **more: Any
) -> Result:
    """Experts are chosen without the bias."""
    return gate(x, tokens, bias=None, **more)


@fault(
    op="gate",
    sites="L0/ffn/gate",
    kinds="decision_flip",
    source="the first layers look experts up by token id",
)
def hash_table_ignored(x: Tensor, tokens: Tensor, *, tid2eid: Tensor | None, **more: Any) -> Result:
    """A hash layer chooses by score."""
    return gate(x, tokens, tid2eid=None, **more)


@fault(
    op="gate",
    sites="L1/ffn/gate",
    kinds="decision_flip shifted",
    why="the table is read at the wrong row",
    source="vllm PR 50844: ids and table rows",
)
def hash_of_the_token_before(
    x: Tensor, tokens: Tensor, *, tid2eid: Tensor | None, **more: Any
) -> Result:
    """The table is read one row too early."""
    if tid2eid is not None:
        tokens = (tokens - 1) % len(tid2eid)
    return gate(x, tokens, tid2eid=tid2eid, **more)


@fault(
    op="gate",
    sites="L2/ffn/gate",
    kinds="constant_factor",
    source="routing weights renormalised over the chosen experts",
)
def not_renormalised(x: Tensor, tokens: Tensor, *, scale: float, **more: Any) -> Result:
    """Routing weights are the plain scores times the scale."""
    _, chosen, scores = gate(x, tokens, scale=scale, **more)
    return scores.gather(1, chosen.long()) * scale, chosen, scores


@fault(
    op="gate",
    sites="L4/ffn/gate",
    kinds="constant_factor",
    source="routed_scaling_factor 1.5 or 2.5",
)
def routed_scale_missing(x: Tensor, tokens: Tensor, *, scale: float, **more: Any) -> Result:
    """The routed scaling factor is left out."""
    return gate(x, tokens, scale=1.0, **more)


@fault(
    op="gate",
    sites="L3/ffn/gate",
    kinds="unexplained decision_flip",
    why="rounded scores, and near ties that fall the other way",
    source="NVIDIA-NeMo/Automodel PR 2201, sglang PR 32340: router in bfloat16",
)
def router_in_bfloat16(x: Tensor, tokens: Tensor, *, weight: Weight, **more: Any) -> Result:
    """The router computes in bfloat16."""
    coarse = with_parts(weight, data=rounded(weight.data.float()), format="dense")
    routing, chosen, scores = gate(rounded(acc(x)), tokens, weight=coarse, **more)
    return rounded(routing), chosen, rounded(scores)


@fault(
    op="gate",
    sites="L4/ffn/gate",
    kinds="unexplained",
    source="another model's scoring function",
)
def sigmoid_scores(
    x: Tensor,
    tokens: Tensor,
    *,
    weight: Weight,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> Result:
    """Scores are sigmoid instead of sqrt(softplus)."""
    return choose(torch.sigmoid(matmul(x, weight)), tokens, bias, tid2eid, k, scale)


def _large_logits(model: Any) -> None:
    """Router logits up to a few hundred in layer 3."""
    site = model.sites["L3/ffn/gate"]
    weight = site.params["weight"]
    site.params["weight"] = with_parts(weight, data=weight.data * 60)
    site.use(site.impl)


@fault(
    op="gate",
    sites="L3/ffn/gate",
    kinds="nan",
    source="softplus as log(1 + exp(x)), without the branch for large x",
    data="router logits above 88",
    prepare=_large_logits,
)
def softplus_overflow(
    x: Tensor,
    tokens: Tensor,
    *,
    weight: Weight,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> Result:
    """softplus overflows for logits above 88."""
    scores = torch.log(1 + torch.exp(matmul(x, weight))).sqrt()
    return choose(scores, tokens, bias, tid2eid, k, scale)


@fault(
    op="gate",
    sites="L3/ffn/gate",
    kinds="decision_flip",
    source="second pass of a top-k does not exclude the first",
)
def best_expert_twice(x: Tensor, tokens: Tensor, *, scale: float, **more: Any) -> Result:
    """The last slot holds the best expert once more."""
    _, chosen, scores = gate(x, tokens, scale=scale, **more)
    chosen = chosen.clone()
    chosen[:, -1] = chosen[:, 0]
    return weights_of(scores, chosen, scale), chosen, scores


@fault(
    op="gate",
    sites="L4/ffn/gate",
    kinds="constant_factor unexplained",
    why="a rounding of the weights by up to half a percent, another for each",
    source="sglang PR 33608: routing weights packed as bfloat16 beside the id",
)
def weights_packed_in_bfloat16(x: Tensor, tokens: Tensor, **params: Any) -> Result:
    """Routing weights are rounded to bfloat16; ids and scores are right."""
    routing, chosen, scores = gate(x, tokens, **params)
    return rounded(routing), chosen, scores
