"""Humming (the package humming-kernels) as a peer of the NVFP4 benchmarks, where it is installed.

Its kernels are built by nvcc at the first call. Weights are random bits, brought into its layout once. Of the experts only its two matrix products are timed: its users bring
routing, activation and sum themselves, so the figure flatters it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from bench_cuda import Call

BF16, CUDA = torch.bfloat16, torch.device("cuda")
INDEXED = {"gemm_type": "indexed"}


def installed() -> bool:
    return importlib.util.find_spec("humming") is not None


def layer(n: int, k: int, experts: int | None = None) -> Any:
    """An NVFP4 matrix [n, k] (or one per expert) of random codes with scales around 1."""
    from humming.layer import HummingLayer
    from humming.schema.modelopt import ModeloptNvfp4WeightSchema

    schema = ModeloptNvfp4WeightSchema(quant_algo="nvfp4").to_humming_schema(BF16)
    found = HummingLayer(
        shape_n=n, shape_k=k, weight_config=schema, num_experts=experts, torch_dtype=BF16
    ).to(CUDA)
    with torch.no_grad():
        found.weight.random_(-(2**31), 2**31 - 1)  # eight codes each
        found.weight_scale.view(torch.uint8).random_(0x20, 0x50)
        found.weight_scale_2.fill_(0.01)
    found.transform()
    return found


def dense(n: int, k: int, m: int) -> Call:
    """One product of bf16 rows [m, k] with a matrix of its own."""
    matrix, x = layer(n, k), torch.randn(m, k, device=CUDA, dtype=BF16)
    return lambda: matrix(x)


@cache
def bank(hidden: int, inner: int, experts: int) -> tuple[Any, Any]:
    """gate and up in one matrix an expert, and down."""
    return layer(2 * inner, hidden, experts), layer(hidden, inner, experts)


def block_rows(matrix: Any, pairs: int) -> int:
    """Rows of a tile, by the package's own choice for that many (token, expert) pairs."""
    from humming.layer import HummingLayerMethod

    choices = HummingLayerMethod.get_default_tuning_configs(matrix, gemm_type="indexed")
    for low, high, config in choices:
        if low < pairs <= high:
            return int(config["block_shape"][0])
    raise ValueError(f"no configuration for {pairs} pairs in {choices}")


def experts(hidden: int, inner: int, chosen: torch.Tensor, count: int) -> Call:
    """Both products of the routed experts; chosen [tokens, experts a token] int32."""
    from humming.testing.data import generate_moe_tensors

    up, down = bank(hidden, inner, count)
    n, k = chosen.shape
    x = torch.randn(n, hidden, device=CUDA, dtype=BF16)
    middle = torch.randn(n * k, inner, device=CUDA, dtype=BF16)

    def plan(matrix: Any) -> dict[str, torch.Tensor]:
        rows = block_rows(matrix, n * k)
        _, _, order, expert_ids, padded = generate_moe_tensors(
            chosen, count, "indexed", block_size_config=rows
        )
        return {"sorted_ids": order, "expert_ids": expert_ids, "num_tokens_padded": padded}

    first, second = plan(up), plan(down)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        a = up(x, **first, top_k=k, compute_config=INDEXED)
        return a, down(middle, **second, top_k=1, compute_config=INDEXED)

    return call
