"""The reference on CUDA tensors: the same numbers as on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.engine.synthetic import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIG = replace(TINY, num_hidden_layers=6, compress_ratios=(0, 4, 128, 4, 128, 4))


@pytest.fixture(scope="module", params=["nvfp4", "deepseek", "bf16"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("cuda") / request.param
    return Checkpoint(write_checkpoint(folder, CONFIG, request.param, seed=3))


def tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(2, CONFIG.vocab_size, (count,), generator=generator).tolist()


def relative_l2(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("chunks", [(), (128, 1, 1, 37)])
def test_float32_equals_the_cpu(checkpoint: Checkpoint, chunks: tuple[int, ...]) -> None:
    ids = tokens(260)
    truth = teacher_forced_logits(Transformer(checkpoint), ids, chunks)
    cuda = Transformer(checkpoint, torch.float32, "cuda")
    assert relative_l2(teacher_forced_logits(cuda, ids, chunks), truth) <= 1e-5


def test_bfloat16_is_as_close_as_the_cpu(checkpoint: Checkpoint) -> None:
    ids = tokens(140)
    truth = teacher_forced_logits(Transformer(checkpoint), ids)
    on_cpu = teacher_forced_logits(Transformer(checkpoint, torch.bfloat16), ids)
    cuda = Transformer(checkpoint, torch.bfloat16, "cuda")
    error = relative_l2(teacher_forced_logits(cuda, ids), truth)
    # Tokens that rounding routes otherwise make most of both errors: 0.6 to 1.3 times over six seeds.
    assert error <= 2 * relative_l2(on_cpu, truth)


def test_the_kernel_route_falls_back_and_says_so(checkpoint: Checkpoint) -> None:
    model = Transformer(checkpoint, torch.bfloat16, "cuda")
    model.set_route(parse_route(["kernel"]))
    for site in model.sites.values():
        assert site.stamp.implementation != "cpu"
        assert site.stamp.implementation != "reference" or site.stamp.note


def test_a_ragged_batch_equals_each_sequence_alone(checkpoint: Checkpoint) -> None:
    model = Transformer(checkpoint, torch.float32, "cuda")
    pieces = [tokens(5), tokens(131), tokens(64)]
    cache = model.new_cache(batch=3)
    together = model.forward(cache.step(pieces), cache)
    first = 0
    for piece in pieces:
        alone = teacher_forced_logits(model, piece)
        assert relative_l2(together[first : first + len(piece)].cpu(), alone) <= 1e-5
        first += len(piece)
