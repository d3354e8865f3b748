"""The engine against transformers' implementation of the same model, float32 and bfloat16."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios
from oracle import (
    cast,
    engine_logits,
    relative_l2,
    transformers_config,
    transformers_logits,
    transformers_model,
)
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import FLASH, Config, YarnScaling
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.ops.rope import rope_frequencies
from dsv4_bench.engine.registry import Site, parse_route, reference
from dsv4_bench.engine.synthetic import LAYOUTS
from dsv4_bench.probes.tap import set_taps

LIMIT = 1e-5
# One selection that flips changes the logits by about 1e-2; scores differ by rounding, about 1e-6.
MARGIN = 2e-6
MIXED = with_ratios(SMALL, 0, 4, 128, 4, 128)
PATTERNS = {
    "mixed": MIXED,
    "pro": with_ratios(SMALL, 128, 128, 4, 128, 4, 0),
    "csa": with_ratios(SMALL, 4, 4, 4),
    "hca": with_ratios(SMALL, 128, 128),
    "swa": with_ratios(SMALL, 0),
    "one-csa": with_ratios(SMALL, 4),
    "one-hca": with_ratios(SMALL, 128),
    "all-hash": replace(with_ratios(SMALL, 4, 128), num_hash_layers=2),
    "all-scored": replace(with_ratios(SMALL, 4, 128), num_hash_layers=0),
}
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 300)


def prompt(length: int, seed: int = 0, vocab: int = SMALL.vocab_size) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


def random_chunks(length: int, seed: int = 0) -> list[int]:
    rng, chunks = random.Random(seed), []
    while sum(chunks) < length:
        chunks.append(min(rng.choice((1, 2, 3, 5, 17, 64, 130)), length - sum(chunks)))
    return chunks


class Pair:
    """Engine and oracle on the same checkpoint; the oracle's logits are computed once a prompt."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.engine = Transformer(self.checkpoint)
        self.oracle = transformers_model(self.checkpoint)
        self._truth = cache(lambda tokens: transformers_logits(self.oracle, tokens))

    def truth(self, tokens: Sequence[int]) -> Tensor:
        return self._truth(tuple(tokens))

    def error(self, tokens: Sequence[int], chunks: Sequence[int] = ()) -> float:
        return relative_l2(engine_logits(self.engine, tokens, chunks), self.truth(tokens))


@pytest.fixture(scope="session")
def pair(make_checkpoint: MakeCheckpoint) -> Any:
    return cache(lambda config, layout="nvfp4", seed=0: Pair(make_checkpoint(layout, config, seed)))


# ------------------------------------------------------------------------------ float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_transformers(pair: Any, layout: str) -> None:
    tokens = prompt(160)
    both = pair(SMALL, layout)
    assert both.error(tokens) <= LIMIT
    assert both.error(tokens, random_chunks(160)) <= LIMIT


@pytest.mark.parametrize("name", PATTERNS)
def test_layer_patterns_in_one_prefill_and_in_random_chunks(pair: Any, name: str) -> None:
    tokens = prompt(300, seed=1)
    both = pair(PATTERNS[name])
    assert both.error(tokens) <= LIMIT
    for seed in range(3):
        assert both.error(tokens, random_chunks(300, seed)) <= LIMIT


@pytest.mark.parametrize("name", ["mixed", "pro"])
def test_token_by_token(pair: Any, name: str) -> None:
    tokens = prompt(300, seed=1)[:262]  # two window wraps, two HCA entries
    both = pair(PATTERNS[name])
    decoded = engine_logits(both.engine, tokens, [1] * len(tokens))
    assert relative_l2(decoded, both.truth(prompt(300, seed=1))[: len(tokens)]) <= LIMIT


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_lengths_then_one_token(pair: Any, length: int) -> None:
    """Each length is a boundary of the window, of a CSA or HCA entry, or of the selection."""
    both = pair(MIXED)
    truth = both.truth(prompt(301))
    tokens = prompt(301)[: length + 1]
    got = engine_logits(both.engine, tokens, [length, 1])
    assert relative_l2(got, truth[: length + 1]) <= LIMIT
    assert relative_l2(got[-1], truth[length]) <= 2 * LIMIT  # no average hides the last token


@pytest.mark.parametrize("name", ["mixed", "csa", "one-csa", "all-scored"])
def test_the_prompts_are_far_from_ties(pair: Any, name: str) -> None:
    """Otherwise rounding could flip a selection and the comparisons above would be luck."""
    margins = selection_margins(pair(PATTERNS[name]).engine, prompt(300, seed=1))
    assert margins and min(margins.values()) > MARGIN, margins


def selection_margins(model: Transformer, tokens: list[int]) -> dict[str, float]:
    """By selecting site: the smallest gap between the last chosen and the first left out, relative
    to the largest score."""
    margins: dict[str, float] = {}

    class Watch:
        def wants(self, site: Site) -> bool:
            return site.op == "index_topk" or (
                site.op == "gate" and site.params["bias"] is not None
            )

        def around(self, site: Site, args: tuple[Any, ...]) -> Any:
            result = site.run(args)
            if site.op == "index_topk":
                scores = args[0]
            else:
                scores = result[2] + site.params["bias"]
            k = site.params["k"]
            best = scores.sort(dim=1, descending=True).values
            gap = (best[:, k - 1] - best[:, k])[best[:, k].isfinite()]
            margins[site.path] = float(gap.min() / best[best.isfinite()].abs().max())
            return result

    set_taps(model.sites.values(), Watch())
    engine_logits(model, tokens)
    set_taps(model.sites.values(), None)
    return margins


def test_selection_really_selects(pair: Any) -> None:
    """300 tokens have 75 CSA entries, of which a token may see 8."""
    engine = pair(MIXED).engine
    cache_ = engine.new_cache()
    engine.forward(cache_.step([prompt(300)]), cache_)
    assert 4 * MIXED.index_topk < 300
    assert cache_.layers[1].index_entries.shape[1] >= 75


def test_clamps_are_hit(pair: Any) -> None:
    """The random weights reach beyond the SwiGLU limit, so an engine without clamp would fail."""
    both = pair(MIXED)
    site = both.engine.sites["L1/ffn/shared"]
    tokens, truth = prompt(160), both.truth(prompt(160))
    assert relative_l2(engine_logits(both.engine, tokens), truth) <= LIMIT
    saved = dict(site.params)
    try:
        site.params["limit"] = 1e9
        site.use(site.impl)  # binds the constants
        assert relative_l2(engine_logits(both.engine, tokens), truth) > 100 * LIMIT
    finally:
        site.params.update(saved)
        site.use(site.impl)


def test_a_batch_of_different_lengths_equals_each_alone(pair: Any) -> None:
    engine = pair(MIXED).engine
    lengths = (131, 1, 128, 40)
    sequences = [prompt(length + 3, seed=length) for length in lengths]
    alone = [engine_logits(engine, s, [len(s) - 3, 1, 2]) for s in sequences]
    cache_ = engine.new_cache(batch=len(sequences))
    pieces = (
        [s[:-3] for s in sequences],
        [s[-3:-2] for s in sequences],
        [s[-2:] for s in sequences],
    )
    together: list[list[Tensor]] = [[] for _ in sequences]
    for piece in pieces:
        step = cache_.step(piece)
        logits = engine.forward(step, cache_)
        for b, rows in enumerate(step.rows()):
            together[b].append(logits[rows])
    for mine, single in zip(together, alone, strict=True):
        assert relative_l2(torch.cat(mine), single) <= LIMIT


def test_snapshot_and_restore_repeat_the_same_bits(pair: Any) -> None:
    engine = pair(MIXED).engine
    cache_ = engine.new_cache()
    engine.forward(cache_.step([prompt(130)]), cache_)
    saved = cache_.snapshot()
    first = engine.forward(cache_.step([prompt(9, seed=5)]), cache_)
    for _ in range(2):  # a snapshot stays usable
        cache_.restore(saved)
        assert cache_.lengths == [130]
        assert torch.equal(engine.forward(cache_.step([prompt(9, seed=5)]), cache_), first)
    cache_.restore(saved)
    other = engine.forward(cache_.step([prompt(9, seed=6)]), cache_)
    assert not torch.equal(other, first)


# ------------------------------------------------------------------------------ RoPE


def test_yarn_frequencies_of_the_released_model() -> None:
    """Values computed by hand from base 160000, factor 16, original length 65536."""
    freqs = rope_frequencies(FLASH, 2)  # CSA
    wanted = {
        1: 0.687656,
        8: 0.05,
        15: 3.635539e-3,
        16: 2.265625e-3,
        20: 2.969778e-4,
        24: 1.953125e-5,
        25: 5.372313e-6,
        31: 5.680529e-7,
    }
    for index, value in wanted.items():
        assert float(freqs[index]) == pytest.approx(value, rel=2e-6)
    sliding = rope_frequencies(FLASH, 0)
    index = torch.arange(32, dtype=torch.float64)
    torch.testing.assert_close(sliding.double(), 10000 ** (-index / 32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer_type", ["main", "compress"])
def test_rotation_at_far_positions_equals_transformers(layer_type: str) -> None:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

    config = FLASH
    rotary = theirs.DeepseekV4RotaryEmbedding(transformers_config(with_ratios(config, 0, 4, 128)))
    positions = torch.tensor([0, 1, 65535, 65536, 65537, 131072, 1_000_000, 1_048_575])
    x = torch.randn(len(positions), 3, 512, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(x[None, :, 0], positions[None], layer_type=layer_type)
    wanted = theirs.apply_rotary_pos_emb(x[None].transpose(1, 2), cos, sin).transpose(1, 2)[0]
    freqs = rope_frequencies(with_ratios(config, 0, 4), {"main": 0, "compress": 1}[layer_type])
    got = reference("rope")(x, positions, freqs=freqs, inverse=False)
    assert relative_l2(got, wanted) < 1e-6
    back = reference("rope")(got, positions, freqs=freqs, inverse=True)
    assert relative_l2(back, x) < 1e-6


def test_beyond_the_original_length(pair: Any) -> None:
    """YaRN with an original length of 64: most positions of the prompt lie beyond it."""
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=64, beta_fast=4.0)
    config = replace(with_ratios(SMALL, 0, 4, 128), rope_scaling=scaling)
    tokens = prompt(300)
    assert pair(config).error(tokens) <= LIMIT
    assert pair(config).error(tokens, random_chunks(300)) <= LIMIT
    plain = pair(replace(config, rope_scaling=None))
    assert plain.error(tokens) <= LIMIT
    assert relative_l2(plain.truth(tokens), pair(config).truth(tokens)) > 1e-3


# ------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_error_is_at_most_twice_that_of_transformers(pair: Any, seed: int) -> None:
    both = pair(MIXED, seed=seed)
    engine = Transformer(both.checkpoint, dtype=torch.bfloat16)
    honest = transformers_model(both.checkpoint, torch.bfloat16)
    ours, theirs = [], []
    for number in range(4):
        tokens = prompt(140, seed=10 * seed + number)
        truth = both.truth(tokens)
        ours.append(relative_l2(engine_logits(engine, tokens), truth))
        theirs.append(relative_l2(transformers_logits(honest, tokens), truth))
    assert 1e-4 < sum(ours) <= 2 * sum(theirs), (ours, theirs)
    assert all(a <= 2 * max(theirs) for a in ours), (ours, theirs)


def test_cast_keeps_in_float32_what_from_pretrained_keeps(pair: Any, tmp_path: Path) -> None:
    from transformers import DeepseekV4ForCausalLM

    config = with_ratios(SMALL, 0, 4, 128)
    fresh = transformers_model(Checkpoint(pair(config).checkpoint.folder))
    fresh.save_pretrained(tmp_path / "saved")
    loaded = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    wanted = {name: p.dtype for name, p in loaded.named_parameters()}
    got = {name: p.dtype for name, p in cast(fresh, torch.bfloat16).named_parameters()}
    assert got == wanted
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}


# ------------------------------------------------------------------------------ kernel route


def kernel_config() -> Config:
    """The released head sizes, which kernels are compiled for."""
    return replace(
        MIXED, head_dim=512, qk_rope_head_dim=64, index_head_dim=128, moe_intermediate_size=128
    )


@pytest.mark.parametrize("layout", ["nvfp4", "nvfp4-dense", "deepseek", "bf16"])
def test_kernel_route_equals_transformers(pair: Any, layout: str) -> None:
    pytest.importorskip("dsv4_bench.engine.cpu")
    both = pair(kernel_config(), layout)
    engine = Transformer(both.checkpoint)
    engine.set_route(parse_route(["kernel"]))
    used = {site.op for site in engine.sites.values() if site.stamp.implementation == "cpu"}
    if not used:
        notes = {site.stamp.note for site in engine.sites.values()}
        pytest.skip(f"no CPU kernel is available: {sorted(notes)[:2]}")
    tokens = prompt(300, seed=1)
    for chunks in ([300], random_chunks(300, 1), [290, *[1] * 10]):
        assert relative_l2(engine_logits(engine, tokens, chunks), both.truth(tokens)) <= 1e-4
