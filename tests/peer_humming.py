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


def schema() -> Any:
    from humming.schema.modelopt import ModeloptNvfp4WeightSchema

    return ModeloptNvfp4WeightSchema(quant_algo="nvfp4").to_humming_schema(BF16)


@cache
def choice(product: Product) -> dict[str, Any]:
    """What the package runs for that product: arguments of a call."""
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    n, k, experts, rows = product
    kind, device = "indexed" if experts else "dense", torch.cuda.current_device()
    shape = {"shape_n": n, "shape_k": k, "num_experts": experts, "torch_dtype": BF16}
    layout = prepare_layer_config(**shape, weight_schema=schema(), device=device)
    choices = get_heuristics_config(layer_config=layout, gemm_type=kind, device=device)
    tuning = next(config for low, high, config in choices if low < rows <= high)
    compute = {"gemm_type": kind} if experts else None
    return {"layer": layout.to_str(), "compute_config": compute, "tuning_config": tuning}


def prepare(products: Iterable[Product]) -> None:
    """Builds the kernels of these products side by side; first calls build one after another."""
    from humming.kernel.humming import HummingKernel

    def build(product: Product) -> None:
        found = dict(choice(product))
        compute = json.dumps(found["compute_config"]) if found["compute_config"] else None
        tuning, device = json.dumps(found["tuning_config"]), torch.cuda.current_device()
        HummingKernel.prepare_kernels(found["layer"], compute, tuning, device)

    chosen = list(dict.fromkeys(products))
    for product in chosen:
        choice(product)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(build, chosen))


def arguments(product: Product) -> dict[str, Any]:
    return {key: value for key, value in choice(product).items() if key != "layer"}


def layer(n: int, k: int, seeds: list[int], experts: int | None = None) -> Any:
    """An NVFP4 matrix [n, k] (or one per expert) of the `codes` of these seeds, in its own layout."""
    from humming.layer import HummingLayer

    found = HummingLayer(
        shape_n=n, shape_k=k, weight_config=schema(), num_experts=experts, torch_dtype=BF16
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
    out, chosen = torch.empty(m, n, device=CUDA, dtype=BF16), arguments((n, k, None, m))
    return (
        lambda: matrix(x, outputs=out, **chosen),
        lambda: error(out, x.float() @ dequantised(turn, n, k).T, 0.02),
    )


@cache
def bank(n: int, k: int, experts: int, which: int) -> Any:
    """The matrices of all experts, of seeds 2 e + which."""
    return layer(n, k, [2 * e + which for e in range(experts)], experts)


def experts(hidden: int, inner: int, chosen: Tensor, count: int) -> Peer:
    """Both products of the routed experts; chosen [tokens, experts a token] int32."""
    up, down = bank(2 * inner, hidden, count, 0), bank(hidden, inner, count, 1)
    n, k = chosen.shape
    x = torch.randn(n, hidden, device=CUDA, dtype=BF16)
    middle = torch.randn(n * k, inner, device=CUDA, dtype=BF16)
    first = torch.empty(n * k, 2 * inner, device=CUDA, dtype=BF16)
    second = torch.empty(n * k, hidden, device=CUDA, dtype=BF16)

    def plan(product: Product) -> dict[str, Any]:
        found = arguments(product)
        pairs, owners, total = aligned(chosen, count, found["tuning_config"]["block_shape"][0])
        padded = torch.tensor(total, device=CUDA, dtype=torch.int32)
        order = {"sorted_ids": pairs, "expert_ids": owners, "num_tokens_padded": padded}
        return {**order, **found}

    up_plan = plan((2 * inner, hidden, count, n * k))
    down_plan = plan((hidden, inner, count, n * k))

    def call() -> None:
        up(x, outputs=first, top_k=k, **up_plan)
        down(middle, outputs=second, top_k=1, **down_plan)

    ones = torch.ones(n * k, device=CUDA)
    return call, lambda: products_error(first, second, x, middle, chosen, ones)
