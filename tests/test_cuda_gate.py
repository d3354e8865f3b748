"""Op gate on a GPU, against float64: all numbers of tokens, ties, NaN and infinities, layers by token id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_judge import FLOOR, kernel
from torch import Tensor

from dsv4_bench.engine.cuda.gate import _in_partial_sums
from dsv4_bench.engine.cuda.library import Library, cuda_build
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.ops.gate import gate
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.probes.metrics import relative_error

pytestmark = pytest.mark.gpu
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
# Whole blocks, and blocks of 64 experts by 128 columns that stick out at either side.
SIZES = [(256, 4096), (384, 7168), (33, 64), (1, 8), (255, 1032), (700, 200)]
FEW = [*range(1, 66), 127, 128, 129, 255, 256]  # tokens
SCALE, LIMIT = 2.5, FLOOR[torch.float32]


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
        "scale": SCALE,
    }


def tokens_of(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=CUDA).to(BF16), torch.randint(0, 50, (n,), device=CUDA)


def judge(x: Tensor, tokens: Tensor, params: dict[str, Any]) -> None:
    """Scores and weights against float64; experts are the best by the kernel's own scores."""
    found = kernel("gate", x, tokens, **params)
    with double_precision():
        _, _, exact = gate(x, tokens, **params)
    assert relative_error(found["scores"].cpu(), exact.float().cpu()) < LIMIT
    if params["tid2eid"] is not None:
        assert torch.equal(found["experts"], params["tid2eid"][tokens].int())
    else:
        biased = found["scores"] + params["bias"]
        order = biased.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(found["experts"], order[:, : params["k"]].int())
    picked = exact.gather(1, found["experts"].long())
    wanted = (picked / picked.sum(-1, keepdim=True) * SCALE).float()
    assert relative_error(found["routing"].cpu(), wanted.cpu()) < LIMIT


@pytest.mark.parametrize("hashed", [False, True])
def test_every_number_of_tokens(hashed: bool) -> None:
    params = arguments(256, 4096, hashed)
    for n in FEW:
        x, tokens = tokens_of(n, 4096)
        assert _in_partial_sums(x, params["weight"])
        judge(x, tokens, params)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("count, d", SIZES)
def test_sizes(count: int, d: int, hashed: bool) -> None:
    params = arguments(count, d, hashed)
    for n in (1, 9, 20, 70, 129, 257):
        x, tokens = tokens_of(n, d)
        assert _in_partial_sums(x, params["weight"]) == (n <= 256)
        judge(x, tokens, params)


def test_nothing_is_rounded_to_bfloat16() -> None:
    """Columns that cancel but for a part in 2^14 or less, which a sum in bfloat16 would lose."""
    x = torch.zeros(5, 4096, device=CUDA, dtype=BF16)
    weight = torch.zeros(64, 4096, device=CUDA, dtype=BF16)
    x[:, [0, 2000, 4095]] = 1
    weight[:, 0], weight[:, 4095] = 256, -256
    weight[:, 2000] = torch.arange(64, device=CUDA) / 4096  # exact, also in a sum with 256
    params = arguments(64, 4096) | {"weight": Weight("gate", "dense", weight)}
    scores = kernel("gate", x, torch.zeros(5, device=CUDA).long(), **params)["scores"]
    wanted = torch.nn.functional.softplus(weight[:, 2000].double()).sqrt().float()
    assert (scores - wanted).abs().max() < 1e-6


def test_ties_nan_and_infinities() -> None:
    """Equal scores: the lower expert. A NaN is chosen first, as the reference's sort puts it."""
    params = arguments(256, 4096)
    params["weight"] = Weight("gate", "dense", torch.zeros(256, 4096, device=CUDA, dtype=BF16))
    params["bias"] = torch.zeros(256, device=CUDA)
    for n in (3, 70):
        x, tokens = tokens_of(n, 4096)
        experts = kernel("gate", x, tokens, **params)["experts"]
        assert experts.tolist() == [[0, 1, 2, 3, 4, 5]] * n
    params["bias"][[100, 200]] = 1
    x, tokens = tokens_of(3, 4096)
    assert kernel("gate", x, tokens, **params)["experts"].tolist() == [[100, 200, 0, 1, 2, 3]] * 3
    params["bias"][[7, 9]] = torch.tensor([float("nan"), float("inf")], device=CUDA)
    params["bias"][200] = float("-inf")
    assert kernel("gate", x, tokens, **params)["experts"].tolist() == [[7, 9, 100, 0, 1, 2]] * 3
    x[1] = float("nan")
    found = kernel("gate", x, tokens, **params)
    assert found["scores"][1].isnan().all() and not found["scores"][[0, 2]].isnan().any()
    assert found["experts"][1].tolist() == [0, 1, 2, 3, 4, 5]


def test_all_experts_in_order() -> None:
    """k = 32 of 32, all chosen, by bias alone."""
    params = arguments(32, 64) | {"k": 32}
    params["bias"] = torch.randperm(32, device=CUDA).float() * 100
    x, tokens = tokens_of(2, 64)
    wanted = params["bias"].sort(descending=True).indices.int()
    assert torch.equal(kernel("gate", x, tokens, **params)["experts"], wanted.expand(2, 32))


def test_strided_and_unaligned() -> None:
    params = arguments(64, 128)
    x, tokens = tokens_of(5, 128)
    first = kernel("gate", x, tokens, **params)
    wide = torch.full((5, 133), torch.nan, device=CUDA, dtype=BF16)
    wide[:, 3:-2] = x
    matrix = torch.full((64 * 128 + 1,), torch.nan, device=CUDA, dtype=BF16)
    matrix[1:] = params["weight"].data.flatten()
    params["weight"] = Weight("gate", "dense", matrix[1:].view(64, 128))
    for name, value in kernel("gate", wide[:, 3:-2], tokens, **params).items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("n", [2, 64])
def test_a_hundred_times_the_same(n: int) -> None:
    """Two layers in turn, as in a decode step, in a graph and launch by launch."""
    layers = [arguments(256, 4096, seed=seed) for seed in (1, 2)]
    x, tokens = tokens_of(n, 4096)
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


def test_its_identity_names_every_build_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, many, and float32 ones: by partial sums, and by both kernels of op linear."""
    called: set[str] = set()
    launch = Library.call

    def watched(self: Library, *args: Any) -> None:
        called.add(self.name)
        launch(self, *args)

    monkeypatch.setattr(Library, "call", watched)
    params = arguments(256, 4096)
    for n, dtype in ((3, BF16), (300, BF16), (3, torch.float32), (300, torch.float32)):
        x, tokens = tokens_of(n, 4096)
        kernel("gate", x.to(dtype), tokens, **params)
    code = IMPLEMENTATIONS["gate"]["sm90"].code
    assert "linear" in called and code is not None
    assert {cuda_build(name).identity() for name in called} <= set(code().split("+"))
