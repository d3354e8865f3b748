"""Bundles for tests: a model small enough to capture whole, every op of it in one bundle"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, parse_route
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes import bundle
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.tap import set_taps

# A hash-routed SWA layer, a CSA layer whose indexer selects, and an HCA layer.
MICRO = replace(
    TINY,
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    n_routed_experts=4,
    moe_intermediate_size=32,
    num_hash_layers=1,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=2,
    compress_ratios=(0, 4, 128),
)
TOKENS = [(5 * i + 2) % 64 for i in range(17)]
MANIFEST = {
    "created": "2026-01-01T00:00:00Z",
    "command": ["test"],
    "versions": {},
    "checkpoint": {},
    "dtype": "float32",
    "numerics": "plain",
    "route": [],
    "tokens": TOKENS,
    "chunks": [16, 1],
    "coverage": {},
}


def micro_model(
    folder: Path, layout: str = "nvfp4", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The micro model, its checkpoint written to `folder`."""
    return Transformer(Checkpoint(write_checkpoint(folder / layout, MICRO, layout, seed=3)), dtype)


@torch.inference_mode()
def capture(
    model: Transformer,
    route: Sequence[str] = ("reference",),
    wanted: Callable[[Site], bool] = lambda site: True,
) -> tuple[list[bundle.BundleCall], Limits]:
    """The ops of a prefill of 16 tokens and a decode of one, examined."""
    import dsv4_bench.engine.cpu  # noqa: F401

    model.set_route(parse_route(route))
    observer, limits, cache = Capture(wanted), Limits(model.dtype), model.new_cache()
    calls = []
    set_taps(model.sites.values(), observer)
    try:
        for forward, piece in enumerate((TOKENS[:16], TOKENS[16:])):
            model.forward(cache.step([piece]), cache)
            calls += [bundle.examine(call, forward, limits) for call in observer.calls]
            observer.calls = []
    finally:
        set_taps(model.sites.values(), None)
    return calls, limits


def write(target: Path, calls: Sequence[bundle.BundleCall], **manifest: object) -> Path:
    """A bundle of `calls` with a manifest that says no more than it has to."""
    with bundle.Writer(target) as writer:
        for call in calls:
            assert writer.add_call(call)
        writer.publish({**MANIFEST, **manifest})
    return target


# Registers `bug`: attention whose second head is 1 % too large. As a plugin file.
PLUGIN = """
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="attention", name="bug")
def attention(*args, **params):
    o, lse = reference("attention")(*args, **params)
    o = o.clone()
    o[:, 1] *= 1.01
    return o, lse
"""


def without_environment(patch: Any) -> None:
    """No environment report in bundles: it asks a dozen programs for their version."""
    patch.setattr("dsv4_bench.workbench.bundles.bundling.examine_machine", lambda: {"sections": {}})
