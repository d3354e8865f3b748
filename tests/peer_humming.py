"""Humming (the package humming-kernels) as a peer of the NVFP4 products, where it is installed.

Its kernels are built at the first call. Of the experts only the two products are timed: its users bring
routing, activation and sum themselves, so the figure flatters it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from peer_library import (
    BF16,
    CUDA,
    GLOBAL,
    Peer,
    aligned,
    codes,
    dequantised,
    error,
    products_error,
)
from torch import Tensor

INDEXED = {"gemm_type": "indexed"}


def installed() -> bool:
    return importlib.util.find_spec("humming") is not None


def layer(n: int, k: int, seeds: list[int], experts: int | None = None) -> Any:
    """An NVFP4 matrix [n, k] (or one per expert) of the `codes` of these seeds, in its own layout."""
    from humming.layer import HummingLayer
    from humming.schema.modelopt import ModeloptNvfp4WeightSchema

    schema = ModeloptNvfp4WeightSchema(quant_algo="nvfp4").to_humming_schema(BF16)
    found = HummingLayer(
        shape_n=n, shape_k=k, weight_config=schema, num_experts=experts, torch_dtype=BF16
    ).to(CUDA)
    with torch.no_grad():
        weight = found.weight.data.view(torch.uint8).view(len(seeds), n, k // 2)
        scale = found.weight_scale.data.view(torch.uint8).view(len(seeds), n, k // 16)
        for i, seed in enumerate(seeds):
            packed, scales = codes(seed, n, k)
            weight[i], scale[i] = packed, scales.view(torch.uint8)
        found.weight_scale_2.fill_(GLOBAL)
    found.transform()
    return found


def dense(n: int, k: int, m: int, turn: int) -> Peer:
    """One product of bf16 rows [m, k] with a matrix of its own."""
    matrix, x = layer(n, k, [turn]), torch.randn(m, k, device=CUDA, dtype=BF16)
    out = torch.empty(m, n, device=CUDA, dtype=BF16)
    return (
        lambda: matrix(x, outputs=out),
        lambda: error(out, x.float() @ dequantised(turn, n, k).T, 0.02),
    )


@cache
def bank(n: int, k: int, experts: int, which: int) -> Any:
    """The matrices of all experts, of seeds 2 e + which."""
    return layer(n, k, [2 * e + which for e in range(experts)], experts)


def block_rows(matrix: Any, pairs: int) -> int:
    """Rows of a tile, by the package's own choice for that many (token, expert) pairs."""
    from humming.layer import HummingLayerMethod

    choices = HummingLayerMethod.get_default_tuning_configs(matrix, gemm_type="indexed")
    for low, high, config in choices:
        if low < pairs <= high:
            return int(config["block_shape"][0])
    raise ValueError(f"no configuration for {pairs} pairs in {choices}")


def experts(hidden: int, inner: int, chosen: Tensor, count: int) -> Peer:
    """Both products of the routed experts; chosen [tokens, experts a token] int32."""
    up, down = bank(2 * inner, hidden, count, 0), bank(hidden, inner, count, 1)
    n, k = chosen.shape
    x = torch.randn(n, hidden, device=CUDA, dtype=BF16)
    middle = torch.randn(n * k, inner, device=CUDA, dtype=BF16)
    first = torch.empty(n * k, 2 * inner, device=CUDA, dtype=BF16)
    second = torch.empty(n * k, hidden, device=CUDA, dtype=BF16)

    def plan(matrix: Any) -> dict[str, Any]:
        pairs, owners, total = aligned(chosen, count, block_rows(matrix, n * k))
        padded = torch.tensor(total, device=CUDA, dtype=torch.int32)
        order = {"sorted_ids": pairs, "expert_ids": owners, "num_tokens_padded": padded}
        return {**order, "compute_config": INDEXED}

    first_plan, second_plan = plan(up), plan(down)

    def call() -> None:
        up(x, outputs=first, top_k=k, **first_plan)
        down(middle, outputs=second, top_k=1, **second_plan)

    ones = torch.ones(n * k, device=CUDA)
    return call, lambda: products_error(first, second, x, middle, chosen, ones)
