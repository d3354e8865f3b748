"""Humming (the package humming-kernels) as a peer of the NVFP4 products, where it is installed.

Its kernels are built at the first call. Of the experts only the two products are timed: its users bring
routing, activation and sum themselves, so the figure flatters it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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

Product = tuple[int, int, int | None, int]  # n, k, experts or None, rows (of all experts)


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


@cache
def bank(n: int, k: int, experts: int, which: int) -> Any:
    """The matrices of all experts, of seeds 2 e + which."""
    return layer(n, k, [2 * e + which for e in range(experts)], experts)


def choice(matrix: Any, rows: int) -> dict[str, Any]:
    """Arguments of a call: the tile that the package itself chooses for that many rows."""
    from humming.tune import get_heuristics_config

    kind, device = "indexed" if matrix.num_experts else "dense", torch.cuda.current_device()
    choices = get_heuristics_config(matrix.humming_config, gemm_type=kind, device=device)
    tuning = next(config for low, high, config in choices if low < rows <= high)
    compute = {"gemm_type": kind} if matrix.num_experts else None
    return {"compute_config": compute, "tuning_config": tuning}


def prepare(products: Iterable[Product]) -> None:
    """Builds the kernels of these products side by side; first calls build one after another."""
    from humming.kernel.humming import HummingKernel

    device = torch.cuda.current_device()

    def matrix(n: int, k: int, experts: int | None) -> Any:
        down = int(n > k)  # of the experts here, gate and up together are square
        return bank(n, k, experts, down) if experts else layer(n, k, [0])

    def build(found: tuple[str, dict[str, Any]]) -> None:
        passed = [json.dumps(value) if value else None for value in found[1].values()]
        HummingKernel.prepare_kernels(found[0], *passed, device)

    chosen = []
    for n, k, experts, rows in dict.fromkeys(products):
        one = matrix(n, k, experts)
        chosen.append((one.humming_config.to_str(), choice(one, rows)))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(build, chosen))


def dense(n: int, k: int, m: int, turn: int) -> Peer:
    """One product of bf16 rows [m, k] with a matrix of its own."""
    matrix, x = layer(n, k, [turn]), torch.randn(m, k, device=CUDA, dtype=BF16)
    out, chosen = torch.empty(m, n, device=CUDA, dtype=BF16), choice(matrix, m)
    return (
        lambda: matrix(x, outputs=out, **chosen),
        lambda: error(out, x.float() @ dequantised(turn, n, k).T, 0.02),
    )


def experts(hidden: int, inner: int, chosen: Tensor, count: int) -> Peer:
    """Both products of the routed experts; chosen [tokens, experts a token] int32."""
    up, down = bank(2 * inner, hidden, count, 0), bank(hidden, inner, count, 1)
    n, k = chosen.shape
    x = torch.randn(n, hidden, device=CUDA, dtype=BF16)
    middle = torch.randn(n * k, inner, device=CUDA, dtype=BF16)
    first = torch.empty(n * k, 2 * inner, device=CUDA, dtype=BF16)
    second = torch.empty(n * k, hidden, device=CUDA, dtype=BF16)

    def plan(matrix: Any) -> dict[str, Any]:
        found = choice(matrix, n * k)
        pairs, owners, total = aligned(chosen, count, found["tuning_config"]["block_shape"][0])
        padded = torch.tensor(total, device=CUDA, dtype=torch.int32)
        order = {"sorted_ids": pairs, "expert_ids": owners, "num_tokens_padded": padded}
        return {**order, **found}

    up_plan, down_plan = plan(up), plan(down)

    def call() -> None:
        up(x, outputs=first, top_k=k, **up_plan)
        down(middle, outputs=second, top_k=1, **down_plan)

    ones = torch.ones(n * k, device=CUDA)
    return call, lambda: products_error(first, second, x, middle, chosen, ones)
