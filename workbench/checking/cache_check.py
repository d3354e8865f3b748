"""Cache rows must not depend on how the tokens were fed: one prefill against the pieces of the check

Looked at in the layers before anything can tip over: up to and including the first that picks
entries or scores experts. There only rounding may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache, LayerCache
from dsv4_bench.engine.config import CSA_RATIO, Config
from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.invariants import Held
from dsv4_bench.probes.metrics import masks_differ, relative_error

WORDS = "cache rows from a prefill equal those from decode"
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a row that is another row is off by about 1
_WRITERS = {
    "ring": "attn/window_write",
    "entries": "attn/compressor/write",
    "index_entries": "attn/index/compressor/write",
}


def steady_layers(config: Config) -> int:
    """How many layers, from the first, no decision comes before."""
    for layer in range(config.num_hidden_layers):
        if config.ratio(layer) == CSA_RATIO or not config.is_hash_layer(layer):
            return layer + 1
    return config.num_hidden_layers


def compare_caches(model: Transformer, tokens: Sequence[int], cache: Cache) -> dict[str, Held]:
    """`cache` holds `tokens`, fed in pieces; one prefill of them on the model's route must give the
    same rows. By the path of the site that wrote them."""
    whole = model.new_cache()
    step = nvtx.begin(whole.step([list(tokens)]))
    x = model.embed(step.tokens)
    limit = LIMIT.get(model.dtype, LIMIT[torch.float32])
    found = {}
    for index in range(steady_layers(model.config)):
        x = model.layers[index](x, whole.layers[index], step)
        for name, site in _WRITERS.items():
            pair = [
                _rows(layers[index], name, len(tokens)) for layers in (cache.layers, whole.layers)
            ]
            if pair[0] is None or pair[1] is None or not pair[0].numel():
                continue
            off = bool(masks_differ(pair[0], pair[1]).any())
            error = float("inf") if off else relative_error(pair[0], pair[1])
            found[f"L{index}/{site}"] = Held(WORDS, error, limit, "unexplained")
    return found


def _rows(layer: LayerCache, name: str, length: int) -> Tensor | None:
    """The rows that `length` tokens have filled."""
    rows = getattr(layer, name)
    if rows is None:
        return None
    return rows[:length] if name == "ring" else rows[0, : length // layer.ratio]
