"""Routed and shared experts: clamped SwiGLU between three matrices.

Source: the release, Expert and MoE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import acc, acc_dtype
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.engine.registry import nbytes, op


class Expert(NamedTuple):
    """w1 = gate [i, d], w3 = up [i, d], w2 = down [d, i]; each with its own global scale."""

    w1: Weight
    w2: Weight
    w3: Weight

    @property
    def nbytes(self) -> int:
        return self.w1.nbytes + self.w2.nbytes + self.w3.nbytes


class ExpertBank(Protocol):
    """The experts of one layer; an expert is read from the checkpoint when it is asked for."""

    def __getitem__(self, expert: int) -> Expert: ...
    def __len__(self) -> int: ...


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit): the gate is clamped from above only."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def expert_forward(x: Tensor, expert: Expert, limit: float, routing: Tensor | None) -> Tensor:
    """x [m, d] -> [m, d] float32; `routing` [m] scales the hidden vector, before w2."""
    gate = acc(matmul(x, expert.w1).to(x.dtype))
    up = acc(matmul(x, expert.w3).to(x.dtype))
    hidden = swiglu(gate, up, limit)  # [m, i]
    if routing is not None:
        hidden = hidden * routing[:, None]
    return matmul(hidden.to(x.dtype), expert.w2)


def chosen_experts(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert in use with the (row, slot) pairs that chose it; raises on an id out of range."""
    flat = experts.reshape(-1).tolist()
    bad = [e for e in flat if not 0 <= e < count]
    if bad:
        raise ValueError(f"expert id {bad[0]} is out of range: the layer has {count} experts")
    for expert in sorted(set(flat)):
        rows, slots = torch.where(experts == expert)
        yield expert, rows, slots


def _flops(a: dict[str, Any]) -> int:
    bank: Sequence[Expert] = a["bank"]
    i, d = bank[0].w1.shape
    return 6 * i * d * a["experts"].numel()


def _traffic(a: dict[str, Any]) -> int:
    """Of the weights, those of the experts that were chosen."""
    used = sorted(set(a["experts"].flatten().tolist()))
    weights = sum(a["bank"][expert].nbytes for expert in used)
    return weights + sum(nbytes(a[name]) for name in ("x", "routing", "experts", "y"))


@op("experts", outputs=("y",), flops=_flops, traffic=_traffic)
def experts(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """y = sum over the k chosen experts of routing * expert(x), float32 [n, d].

    x [n, d], routing [n, k] float32, experts [n, k] int32.
    """
    y = torch.zeros(x.shape, dtype=acc_dtype(), device=x.device)
    for expert, rows, slots in chosen_experts(experts, len(bank)):
        y.index_add_(0, rows, expert_forward(x[rows], bank[expert], limit, routing[rows, slots]))
    return y


def _shared_flops(a: dict[str, Any]) -> int:
    i, d = a["expert"].w1.shape
    return 6 * i * d * a["x"].shape[0]


@op("shared_expert", outputs=("y",), flops=_shared_flops)
def shared_expert(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The expert every token uses, with the same clamp and no routing weight: [n, d] -> float32 [n, d]."""
    return expert_forward(x, expert, limit, None)


@op("moe_sum", outputs=("y",))
def moe_sum(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    """routed + shared in float32 [n, d], one cast to `dtype`."""
    return (routed + shared).to(dtype)
