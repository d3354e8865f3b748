"""Faults of routed and shared experts: global scales, gate and up, clamps, tokens to experts"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.experts import Expert, ExpertBank, chosen_experts, swiglu
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.probes.faults.base import altered, fault, noise_of_call, right, with_parts
from dsv4_bench.probes.faults.linear import swapped_nibbles

experts = right("experts")
shared_expert = right("shared_expert")
moe_sum = right("moe_sum")

Activation = Callable[[Tensor, Tensor, float], Tensor]
One = Callable[[int, Expert, Tensor, Tensor], Tensor]


def forward(
    x: Tensor, expert: Expert, limit: float, routing: Tensor | None, act: Activation = swiglu
) -> Tensor:
    """The reference's expert with another activation: x [m, d] -> float32 [m, d]."""
    gate = acc(matmul(x, expert.w1).to(x.dtype))
    up = acc(matmul(x, expert.w3).to(x.dtype))
    hidden = act(gate, up, limit)
    if routing is not None:
        hidden = hidden * routing[:, None]
    return matmul(hidden.to(x.dtype), expert.w2)


def routed(x: Tensor, routing: Tensor, chosen: Tensor, bank: ExpertBank, one: One) -> Tensor:
    """The reference's loop with `one(number, expert, rows of x, routing [m])` for an expert."""
    y = torch.zeros(x.shape, device=x.device)
    for number, rows, slots in chosen_experts(chosen, len(bank)):
        y.index_add_(0, rows, one(number, bank[number], x[rows], routing[rows, slots]))
    return y


# ------------------------------------------------------------------------------ scales


@fault(
    op="experts",
    sites="L2/ffn/experts",
    kinds="constant_factor",
    source="weight_scale_2 dropped, stacked path",
)
def experts_scale_2_dropped(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """The stacked down projections are used without their global scales."""
    return routed(
        x,
        routing,
        experts,
        bank,
        lambda e, expert, rows, r: forward(rows, expert, limit, r) / expert.w2.global_scale,
    )


@fault(
    op="experts",
    sites="L3/ffn/experts",
    kinds="rows constant_factor",
    why="only tokens of that expert are wrong, by a missing factor",
    source="weight_scale_2 dropped, per-expert path",
)
def one_expert_scale_2_dropped(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Expert 3 alone misses the global scale of its down projection."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        y = forward(rows, expert, limit, r)
        return y / expert.w2.global_scale if number == 3 else y

    return routed(x, routing, experts, bank, one)


@fault(
    op="shared_expert",
    sites="L4/ffn/shared",
    kinds="constant_factor",
    source="weight_scale_2 dropped in Nvfp4SharedExpert",
)
def shared_scale_2_dropped(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The shared expert's down projection is used without its global scale."""
    return shared_expert(x, expert=expert, limit=limit) / expert.w2.global_scale


@fault(
    op="experts",
    sites="L4/ffn/experts",
    kinds="constant_factor",
    source="vllm PR 26135: one expert's scale for the whole layer",
)
def scale_2_of_expert_0(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Every expert's down projection uses expert 0's global scale."""
    first = bank[0].w2.global_scale

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        return forward(rows, expert, limit, r) * (first / expert.w2.global_scale)

    return routed(x, routing, experts, bank, one)


@fault(
    op="experts",
    sites="L1/ffn/experts",
    kinds="constant_factor",
    source="vllm issue 54974: gate and up with different weight_scale_2, one used for both",
)
def up_uses_gate_scale(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """The fused gate and up product uses gate's global scale for both halves."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        up = with_parts(expert.w3, global_scale=expert.w1.global_scale)
        return forward(rows, expert._replace(w3=up), limit, r)

    return routed(x, routing, experts, bank, one)


@fault(
    op="experts",
    sites="L2/ffn/experts",
    kinds="nibbles",
    source="low nibble first",
)
def experts_nibbles_swapped(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """In all experts the high nibble is taken for the even column."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        return forward(rows, Expert(*(altered(w, swapped_nibbles) for w in expert)), limit, r)

    return routed(x, routing, experts, bank, one)


def _as_e4m3(weight: Weight) -> Weight:
    """MXFP4 scales as a loader for NVFP4 would hold them: powers of two rounded to e4m3."""
    if weight.format != "mxfp4":
        return weight
    assert weight.scale is not None
    values = weight.scale.float().clamp(max=448).to(torch.float8_e4m3fn).float()
    values = values.repeat_interleave(2, 1).to(torch.float8_e4m3fn)
    return with_parts(weight, format="nvfp4", scale=values)


@fault(
    op="experts",
    sites="L3/ffn/experts",
    kinds="scale_order flushed",
    why="scales decoded as another format; those below its range become zero",
    source="hikarioyama/dsv4-flash-nvfp4-sm120, kaitakuai/vllm issue 20",
    layout="deepseek",
)
def mxfp4_scales_copied_into_e4m3(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """MXFP4 experts go through the NVFP4 loader: their scales are copied by value into e4m3."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        return forward(rows, Expert(*(altered(w, _as_e4m3) for w in expert)), limit, r)

    return routed(x, routing, experts, bank, one)


# ------------------------------------------------------------------------------ gate, up, clamp


@fault(
    op="experts",
    sites="L3/ffn/experts",
    kinds="permuted halves_swapped",
    why="w1 and w3 are two arguments and the two halves of one fused matrix",
    source="sglang PR 39388: [w3; w1] against [w1; w3]",
)
def gate_and_up_exchanged(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """The halves of the fused first matrix are in the other order: silu is applied to up."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        return forward(rows, Expert(expert.w3, expert.w2, expert.w1), limit, r)

    return routed(x, routing, experts, bank, one)


@fault(
    op="experts",
    sites="L2/ffn/experts",
    kinds="saturated",
    source="transformers PR 40197, vllm PR 42209: swiglu_limit not passed",
    data="activations beyond the limit of 10",
)
def clamp_missing(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """SwiGLU is not clamped; only outliers show it."""
    return right("experts")(x, routing, experts, bank=bank, limit=float("inf"))


def _both_sides(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(-limit, limit)) * up.clamp(-limit, limit)


@fault(
    op="shared_expert",
    sites="L3/ffn/shared",
    kinds="saturated",
    source="vllm PR 42209: the clamp is asymmetric",
    data="gate below -10",
)
def gate_clamped_below(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The gate is clamped from below too, where silu is nearly zero anyway."""
    return forward(x, expert, limit, None, _both_sides)


def _after(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


@fault(
    op="experts",
    sites="L4/ffn/experts",
    kinds="saturated",
    source="the release: clamp before the activation",
    data="activations beyond the limit of 10",
)
def clamp_after_silu(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """The gate is clamped after silu instead of before: 10 for 9.9995 where it is large."""
    return routed(
        x,
        routing,
        experts,
        bank,
        lambda e, expert, rows, r: forward(rows, expert, limit, r, _after),
    )


def _up_unclamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up


@fault(
    op="shared_expert",
    sites="L0/ffn/shared",
    kinds="saturated",
    source="the release: up in [-10, 10], also in the shared expert",
    data="activations beyond the limit of 10",
)
def up_not_clamped(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """Only the gate is clamped, up is not."""
    return forward(x, expert, limit, None, _up_unclamped)


def _gelu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.gelu(gate.clamp(max=limit), approximate="tanh") * up.clamp(-limit, limit)


@fault(
    op="shared_expert",
    sites="L1/ffn/shared",
    kinds="unexplained",
    source="another model's activation",
)
def gelu_for_silu(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The activation is GELU."""
    return forward(x, expert, limit, None, _gelu)


# ------------------------------------------------------------------------------ tokens to experts


@fault(
    op="experts",
    sites="L4/ffn/experts",
    kinds="permuted",
    source="routing weights packed beside the ids, read in the other order",
)
def routing_weights_reversed(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Every token's routing weights go to its experts in the opposite order."""
    return right("experts")(x, routing.flip(1), experts, bank=bank, limit=limit)


@fault(
    op="experts",
    sites="L3/ffn/experts",
    kinds="rows",
    source="loop over experts one short",
)
def last_expert_skipped(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """The last expert is never run; its tokens get nothing from it."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        y = forward(rows, expert, limit, r)
        return torch.zeros_like(y) if number == len(bank) - 1 else y

    return routed(x, routing, experts, bank, one)


@fault(
    op="experts",
    sites="L2/ffn/experts",
    kinds="rows",
    source="grouped product with tiles of 16 tokens",
)
def group_tail_not_computed(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Of an expert's tokens those beyond the last full tile of 16 are not computed."""

    def one(number: int, expert: Expert, rows: Tensor, r: Tensor) -> Tensor:
        y = forward(rows, expert, limit, r)
        full = len(y) // 16 * 16
        if full:
            y[full:] = 0
        return y

    return routed(x, routing, experts, bank, one)


@fault(
    op="experts",
    sites="L1/ffn/experts",
    kinds="nondeterministic",
    source="Avarok-Cybersecurity/atlas PR 1099: scatter-add that is not atomic at one row",
)
def scatter_add_race(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """With one token the experts' results are added up without atomics: now and then one is lost."""
    y = right("experts")(x, routing, experts, bank=bank, limit=limit)
    if len(x) > 1:
        return y
    lost = noise_of_call("scatter_add_race", y) > 1.0
    return torch.where(lost, 0.5 * y, y)


@fault(
    op="shared_expert",
    sites="L2/ffn/shared",
    kinds="columns tiles",
    why="a tile of columns is wrong in every row",
    source="last tile of the down projection",
)
def shared_last_tile_doubled(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The last 16 columns are added up twice."""
    y = shared_expert(x, expert=expert, limit=limit).clone()
    y[:, -16:] *= 2
    return y


@fault(op="moe_sum", sites="L2/ffn/sum", kinds="unexplained", source="a residual in 16 bits")
def moe_sum_in_bfloat16(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The two halves are rounded to bfloat16 before they are added."""
    return (routed.bfloat16() + shared.bfloat16()).to(dtype)


@fault(
    op="moe_sum",
    sites="L3/ffn/sum",
    kinds="constant_factor unexplained",
    why="one of the two terms has the factor 1.5",
    source="the routed scaling factor applied to the sum",
)
def route_scale_on_shared(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The routed scaling factor is applied to the shared expert as well."""
    return moe_sum(routed, 1.5 * shared, dtype=dtype)
