"""Chunking, sampling and token ids."""

from __future__ import annotations

import json

import pytest
import torch

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import generate, sample, split, teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.tokens import check_token_ids, read_token_file

TOKENS = [(17 * i + 5) % 300 for i in range(150)]


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return Transformer(Checkpoint(make_checkpoint()))


@pytest.mark.parametrize(
    ("count", "chunks", "spans"),
    [
        (5, [], [(0, 5)]),
        (5, [2], [(0, 2), (2, 4), (4, 5)]),
        (5, [3, 1], [(0, 3), (3, 4), (4, 5)]),
        (5, [9], [(0, 5)]),
        (0, [2], []),
    ],
)
def test_split(count, chunks, spans):
    assert split(count, chunks) == spans


def test_split_refuses_empty_pieces():
    with pytest.raises(DSV4Error, match="found -1"):
        split(3, [2, -1])


@pytest.mark.parametrize("chunks", [[1], [128, 1], [7], [129, 20], [149]])
def test_logits_do_not_depend_on_the_chunks(model, chunks):
    whole = teacher_forced_logits(model, TOKENS)
    pieces = teacher_forced_logits(model, TOKENS, chunks)
    assert whole.shape == (150, 300) and whole.dtype == torch.float32
    assert float((pieces - whole).norm() / whole.norm()) < 1e-5


def test_generate_is_greedy_over_the_logits(model):
    new = list(generate(model, TOKENS[:20], 4))
    logits = teacher_forced_logits(model, TOKENS[:20] + new[:-1])
    assert new == logits[19:].argmax(-1).tolist()


def test_the_end_of_sentence_ends_it(model, monkeypatch):
    new = list(generate(model, TOKENS[:20], 4))
    object.__setattr__(model.config, "eos_token_id", new[1])
    try:
        assert list(generate(model, TOKENS[:20], 4)) == new[: new.index(new[1]) + 1]
    finally:
        object.__setattr__(model.config, "eos_token_id", 1)


def test_temperature_and_seed(model):
    def run(temperature, seed):
        return list(generate(model, TOKENS[:5], 6, temperature, seed))

    assert run(1.0, 1) == run(1.0, 1)
    assert len({tuple(run(1.5, seed)) for seed in range(4)}) > 1
    assert run(1e-300, 3) == run(0.0, 0)


def test_sample_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, 1.0])
    counts = torch.bincount(torch.tensor([sample(logits, 1.0, generator) for _ in range(3000)]))
    assert torch.allclose(counts / 3000, logits.softmax(-1), atol=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sample_refuses_what_is_not_finite(bad):
    with pytest.raises(DSV4Error, match="1 of 3 logits") as error:
        sample(torch.tensor([0.0, bad, 1.0]), 0.0, torch.Generator())
    assert error.value.exit_code == 5


@pytest.mark.parametrize("token", [-1, 300, 1.0, True, "1", None, [1], 10**30])
def test_bad_ids_are_named_with_their_position(token):
    with pytest.raises(DSV4Error, match="at position 2 is not in the vocabulary"):
        check_token_ids([0, 299, token, -5], 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no list"),
        ("{}", "no list"),
        ("3", "no list"),
        ("[1, 2", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_bad_token_files(tmp_path, text, message):
    file = tmp_path / "ids.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DSV4Error, match=message) as error:
        read_token_file(str(file))
    assert str(file) in error.value.message and error.value.hint


def test_token_files(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([1, 2, 3]))
    assert read_token_file(str(file)) == [1, 2, 3]
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DSV4Error, match=message):
            read_token_file(str(path))
