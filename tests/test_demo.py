"""The demo checkpoint: it is there, it is small, it is the real architecture, and it knows things."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import transformers_logits, transformers_model

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine import demo
from dsv4_bench.engine.census import layout_words
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.errors import BadCheckpoint
from dsv4_bench.engine.generate import generate, teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.workbench.cli import main as cli
from dsv4_bench.workbench.loading import default_prompt

ROUTES = ("reference", "kernel")
ANSWERS = {
    "note maria 42 . note hugo 17 . recall maria": "42 .",
    "note maria 42 . note hugo 17 . what is the code of hugo ?": "17 .",
    "copy d e m o :": "d e m o .",
    "3 + 4 =": "7 .",
    "the day after friday is": "saturday .",
    "all cats like": "fish .",
    "count from 7 :": "7 8 9 10 11 12",
}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(demo.demo_checkpoint())


@pytest.fixture(scope="module", params=ROUTES)
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Transformer:
    model = Transformer(checkpoint)
    model.set_route(parse_route([request.param]))
    return model


def test_it_is_the_real_architecture_and_small(checkpoint: Checkpoint) -> None:
    assert checkpoint.problems == [] and checkpoint.extra == []
    config = checkpoint.config
    assert config.num_hidden_layers >= 16 and config.num_hash_layers == 3
    assert {config.attention_kind(i) for i in range(config.num_hidden_layers)} == {
        "SWA",
        "CSA",
        "HCA",
    }
    assert (config.head_dim, config.qk_rope_head_dim, config.index_head_dim) == (512, 64, 128)
    assert config.index_n_heads >= 16 and 16 <= config.index_topk <= 32
    assert (config.sliding_window, config.hc_mult) == (128, 4)
    assert "NVFP4" in layout_words(checkpoint) and "ModelOpt" in layout_words(checkpoint)
    assert sum(p.stat().st_size for p in checkpoint.folder.iterdir()) <= 32e6


@pytest.mark.parametrize(("prompt", "answer"), ANSWERS.items())
def test_it_answers(model: Transformer, prompt: str, answer: str) -> None:
    ids = [tasks.ID[tasks.BOS], *tasks.encode(prompt)]
    new = list(generate(model, ids, len(answer.split())))
    assert tasks.decode(new) == answer


@pytest.mark.parametrize("distance", [60, 200, 900])
def test_it_recalls_a_fact_at_a_distance(checkpoint: Checkpoint, distance: int) -> None:
    """In the window, from compressed entries, and from those the indexer selects."""
    model = Transformer(checkpoint)
    model.set_route(parse_route(["kernel"]))
    for seed in range(2):
        ids, value, _ = tasks.needle(f"test/{distance}/{seed}", distance)
        assert next(iter(generate(model, ids, 1, chunks=[512]))) == value


def test_without_the_compressed_entries_it_forgets(checkpoint: Checkpoint) -> None:
    """The recall beyond the window is done by what it should be done by."""
    model = Transformer(checkpoint)
    model.set_route(parse_route(["kernel"]))
    for site in model.sites.values():
        if site.op == "attention":
            function = site.impl.function

            def blind(q, window, index, entries, entry_index, *, run=function, **params):  # type: ignore[no-untyped-def]
                return run(q, window, index, None, None, **params)

            site._run = lambda *args, site=site, blind=blind: blind(*args, **site.params)
    near, value, _ = tasks.needle("test/60/0", 60)
    assert next(iter(generate(model, near, 1))) == value
    hits = 0
    for seed in range(4):
        far, value, _ = tasks.needle(f"test/200/{seed}", 200)
        hits += next(iter(generate(model, far, 1))) == value
    assert hits <= 1


def test_routes_predict_the_same_words(checkpoint: Checkpoint) -> None:
    ids = tasks.document("test", 200).ids
    words = []
    for route in ROUTES:
        model = Transformer(checkpoint)
        model.set_route(parse_route([route]))
        logits = teacher_forced_logits(model, ids)
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > 1e-2
        words.append(torch.where(clear, logits.argmax(-1), -1))
    assert torch.equal(*words)


def digest(logits: torch.Tensor) -> list[float]:
    """Eight numbers that every logit moves: its sum with fixed random signs, by the square root of
    the number of logits. Unlike a hash they bear another order of additions."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (8, logits.numel()), generator=generator).double() * 2 - 1
    return (signs @ logits.double().flatten() / logits.numel() ** 0.5).tolist()


# Of the reference in float64 on the text tasks.document("pinned", 300).
PINNED_DIGEST = [-4.85991, -4.17755, -0.84932, 7.22679, 1.66447, 13.06432, 2.06112, 1.3759]
PINNED_WORDS = "song for the cat . then the cat was happy . the"


def test_pinned_tokens_and_logits(model: Transformer) -> None:
    ids = tasks.document("pinned", 300).ids
    assert digest(teacher_forced_logits(model, ids)) == pytest.approx(PINNED_DIGEST, abs=1e-4)
    assert tasks.decode(list(generate(model, ids, 12))) == PINNED_WORDS


def test_the_pinned_digest_is_that_of_float64_and_of_transformers(checkpoint: Checkpoint) -> None:
    ids = tasks.document("pinned", 300).ids
    with double_precision():
        ours = teacher_forced_logits(Transformer(checkpoint), ids)
    theirs = transformers_logits(transformers_model(checkpoint), ids)
    assert digest(ours) == pytest.approx(PINNED_DIGEST, abs=2e-5)
    assert digest(theirs) == pytest.approx(PINNED_DIGEST, abs=1e-4)


# ------------------------------------------------------------------------------ generate --eval


def test_eval_measures_what_it_can_do(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["generate", "--eval", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    bands = {name: hits for name, hits in result["tally"].items() if name.startswith("recall")}
    assert set(bands) >= {"recall d<128", "recall 128-511", "recall 512-1023"}
    assert all(right / asked >= 0.95 for right, asked in bands.values())
    assert ["3 + 4 =", "7 ."] in [[prompt, text[:3]] for prompt, text in result["texts"]]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--eval", "0"], 2, "at least one text"),
        (["--eval", "--prompt", "recall maria"], 2, "brings its own prompts"),
    ],
)
def test_eval_refuses(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["generate", *arguments]) == code
    assert words in capsys.readouterr().err


def test_eval_knows_the_demo_model_only(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["generate", str(make_checkpoint()), "--eval"]) == 3
    assert "demo model's words" in capsys.readouterr().err


def test_the_default_prompt_asks_for_something(model: Transformer) -> None:
    ids = [tasks.ID[tasks.BOS], *tasks.encode(default_prompt(demo.SHIPPED))]
    assert tasks.ID[tasks.UNK] not in ids and len(ids) > 160
    assert tasks.decode(list(generate(model, ids, 1))) == "67"


# ------------------------------------------------------------------------------ finding it


def test_argument_then_variable_then_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("DSV4_CKPT", raising=False)
    assert demo.resolve_checkpoint(None) == demo.SHIPPED
    monkeypatch.setenv("DSV4_CKPT", str(tmp_path / "b"))
    assert demo.resolve_checkpoint(None) == tmp_path / "b"
    assert demo.resolve_checkpoint(str(tmp_path / "a")) == tmp_path / "a"
    monkeypatch.setenv("DSV4_CKPT", str(tmp_path / "gone"))
    with pytest.raises(BadCheckpoint, match="DSV4_CKPT"):
        demo.resolve_checkpoint(None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.resolve_checkpoint("~/a") == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    assert demo.resolve_checkpoint("demo") == demo.SHIPPED
    (tmp_path / "demo").mkdir()  # one's own folder of that name goes first
    assert demo.resolve_checkpoint("demo") == Path("demo")


def test_a_demo_that_somebody_took_files_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(demo.SHIPPED, copy)
    monkeypatch.setattr(demo, "SHIPPED", copy)
    next(copy.glob("*00001*.safetensors")).unlink()
    with pytest.raises(BadCheckpoint, match="lacks model-00001") as caught:
        demo.demo_checkpoint()
    assert "install" in caught.value.hint


def test_finding_the_checkpoint_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dsv4_bench.engine.demo import resolve_checkpoint;"
        f"resolve_checkpoint({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
