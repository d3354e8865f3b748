"""Op gate of up to four tokens in one kernel, against float64 on a GPU; test_cuda_linear.py has the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_judge import kernel
from torch import Tensor

from dsv4_bench.engine.cuda.gate import _takes_few
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.ops.gate import gate
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.probes.metrics import relative_error

pytestmark = pytest.mark.gpu
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
SIZES = [(256, 4096), (33, 64), (1, 8), (255, 1032), (16, 2048), (17, 3000)]


def arguments(count: int, d: int, hashed: bool = False, seed: int = 3) -> dict[str, Any]:
    torch.manual_seed(seed)
    k = min(count, 6)
    table = torch.stack([torch.randperm(count)[:k] for _ in range(50)]).to(CUDA)
    weight = (torch.randn(count, d, device=CUDA) / d**0.5).to(BF16)
    return {
        "weight": Weight("gate", "dense", weight),
        "bias": None if hashed else torch.randn(count, device=CUDA),
        "tid2eid": table if hashed else None,
        "k": k,
        "scale": 2.5,
    }


def tokens_of(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=CUDA).to(BF16), torch.randint(0, 50, (n,), device=CUDA)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("count, d", SIZES)
def test_few_tokens_against_float64(count: int, d: int, hashed: bool) -> None:
    params = arguments(count, d, hashed)
    for n in (1, 2, 3, 4):
        x, tokens = tokens_of(n, d)
        assert _takes_few(x, params["weight"])
        found = kernel("gate", x, tokens, **params)
        with double_precision():
            _, _, exact = gate(x, tokens, **params)
        assert relative_error(found["scores"].cpu(), exact.float().cpu()) < 1e-6
        if hashed:
            assert torch.equal(found["experts"], params["tid2eid"][tokens].int())
        else:
            biased = found["scores"] + params["bias"]
            order = biased.sort(dim=-1, descending=True, stable=True).indices
            assert torch.equal(found["experts"], order[:, : params["k"]].int())
        picked = exact.gather(1, found["experts"].long())
        wanted = (picked / picked.sum(-1, keepdim=True) * 2.5).float()
        assert relative_error(found["routing"].cpu(), wanted.cpu()) < 1e-6


def test_what_one_kernel_does_not_take() -> None:
    params = arguments(64, 128)
    x, _ = tokens_of(5, 128)
    weight = params["weight"]
    assert not _takes_few(x, weight) and not _takes_few(x[:0], weight)
    assert not _takes_few(x[:4].float(), weight)
    assert not _takes_few(x[:4], replace(weight, data=weight.data.float()))
    for count, d in ((4, 4104), (257, 64)):
        wide = Weight("gate", "dense", torch.zeros(count, d, device=CUDA, dtype=BF16))
        assert not _takes_few(torch.zeros(1, d, device=CUDA, dtype=BF16), wide)
    odd = torch.zeros(2 * 128 + 1, device=CUDA, dtype=BF16)[1:].view(2, 128)
    assert not _takes_few(odd, weight)


def test_ties_nan_and_infinities() -> None:
    """Equal scores: the lower expert. A NaN is chosen first, as the reference's sort puts it."""
    params = arguments(256, 4096)
    params["weight"] = Weight("gate", "dense", torch.zeros(256, 4096, device=CUDA, dtype=BF16))
    params["bias"] = torch.zeros(256, device=CUDA)
    params["bias"][[100, 200]] = 1
    x, tokens = tokens_of(3, 4096)
    assert kernel("gate", x, tokens, **params)["experts"].tolist() == [[100, 200, 0, 1, 2, 3]] * 3
    params["bias"][[7, 9]] = torch.tensor([float("nan"), float("inf")], device=CUDA)
    params["bias"][200] = float("-inf")
    assert kernel("gate", x, tokens, **params)["experts"].tolist() == [[7, 9, 100, 0, 1, 2]] * 3
    x[1] = float("nan")
    found = kernel("gate", x, tokens, **params)
    assert found["scores"][1].isnan().all() and not found["scores"][[0, 2]].isnan().any()


def test_a_hundred_times_the_same() -> None:
    """Two layers in turn, as in a decode step, in a graph and launch by launch."""
    layers = [arguments(256, 4096, seed=seed) for seed in (1, 2)]
    x, tokens = tokens_of(2, 4096)
    run = IMPLEMENTATIONS["gate"]["sm90"].function
    first = [run(x, tokens, **params) for params in layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run(x, tokens, **params) for params in layers]
    for _ in range(100):
        for tensor in (t for outputs in captured for t in outputs):
            tensor.fill_(-1)
        graph.replay()
        again = [run(x, tokens, **params) for params in layers]
        for outputs in (captured, again):
            for found, wanted in zip(outputs, first, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
