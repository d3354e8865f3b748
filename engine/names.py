"""Tensor names: every layout's spelling mapped to the original one, and what a model must contain.

The original names (``layers.3.attn.wq_a``) are the ones used everywhere in this project. Files may
spell them as the release does, as transformers does (``model.layers.3.self_attn.q_a_proj``), or
with ModelOpt's and compressed-tensors' companions (``weight_scale_2``, ``weight_packed``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dsv4_bench.engine.config import CSA_RATIO, Config

_TOP = {
    "embed_tokens.": "embed.",
    "lm_head.": "head.",
    "hc_head.hc_": "hc_head_",
}
_BLOCK = {
    "self_attn.": "attn.",
    "mlp.": "ffn.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_",
}
_ATTENTION = {
    "compressor.indexer.scorer.weights_proj": "indexer.weights_proj",
    "compressor.indexer.q_b_proj": "indexer.wq_b",
    "compressor.indexer.": "indexer.compressor.",
    "compressor.kv_norm": "compressor.norm",
    "q_a_norm": "q_norm",
    "q_a_proj": "wq_a",
    "q_b_proj": "wq_b",
    "kv_proj": "wkv",
    "gate_proj": "wgate",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    "position_bias": "ape",
}
_EXPERT = re.compile(r"\b(experts\.\d+|shared_experts)\.(gate_proj|up_proj|down_proj)\b")
_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_LAYER = re.compile(r"^(layers\.\d+\.)(.*)$")


def canonical(key: str) -> str:
    """The original name of a stored tensor, whatever spelling its file uses."""
    name = key.removeprefix("model.")
    if ".ffn.experts." in name and "_proj" not in name and not name.endswith("_inv"):
        return name  # nine keys of ten, and already original
    for theirs, ours in _TOP.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = _LAYER.match(name)
    if not match:
        return name
    layer, rest = match.groups()
    for theirs, ours in _BLOCK.items():
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    if rest.startswith("attn."):
        for theirs, ours in _ATTENTION.items():
            rest = rest.replace(theirs, ours)
        rest = rest.replace("compressor.kv_norm", "compressor.norm")
        rest = re.sub(r"\.sinks$", ".attn_sink", rest)
    if rest.startswith("ffn."):
        rest = rest.replace("gate.e_score_correction_bias", "gate.bias")
        rest = _EXPERT.sub(lambda m: f"{m[1]}.{_EXPERT_NAMES[m[2]]}", rest)
    return layer + rest.replace(".weight_scale_inv", ".scale")


class Expected(NamedTuple):
    """`name` is a full tensor name, or for kind `matrix` the prefix of .weight and companions."""

    name: str
    shape: tuple[int, ...]
    kind: str  # matrix: any format; plain: dense floats; ids: integers


def expected_tensors(config: Config) -> Iterator[Expected]:
    """Everything the main model needs, in the order of the forward pass."""
    c = config
    yield Expected("embed", (c.vocab_size, c.hidden_size), "matrix")
    for layer in range(c.num_hidden_layers):
        prefix = f"layers.{layer}."
        for item in _layer_tensors(c, layer):
            yield Expected(prefix + item.name, item.shape, item.kind)
    yield from _hyper("hc_head", c, c.hc_mult, 1)
    yield Expected("norm.weight", (c.hidden_size,), "plain")
    yield Expected("head", (c.vocab_size, c.hidden_size), "matrix")


def _hyper(name: str, c: Config, rows: int, scales: int) -> Iterator[Expected]:
    yield Expected(f"{name}_fn", (rows, c.hc_mult * c.hidden_size), "plain")
    yield Expected(f"{name}_base", (rows,), "plain")
    yield Expected(f"{name}_scale", (scales,), "plain")


def _layer_tensors(c: Config, layer: int) -> Iterator[Expected]:
    d, i = c.hidden_size, c.moe_intermediate_size
    mixes = (2 + c.hc_mult) * c.hc_mult
    yield from _hyper("hc_attn", c, mixes, 3)
    yield Expected("attn_norm.weight", (d,), "plain")
    yield from _attention_tensors(c, layer)
    yield from _hyper("hc_ffn", c, mixes, 3)
    yield Expected("ffn_norm.weight", (d,), "plain")
    yield Expected("ffn.gate", (c.n_routed_experts, d), "matrix")
    if c.is_hash_layer(layer):
        yield Expected("ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "ids")
    else:
        yield Expected("ffn.gate.bias", (c.n_routed_experts,), "plain")
    for expert in [f"experts.{e}" for e in range(c.n_routed_experts)] + ["shared_experts"]:
        yield Expected(f"ffn.{expert}.w1", (i, d), "matrix")
        yield Expected(f"ffn.{expert}.w2", (d, i), "matrix")
        yield Expected(f"ffn.{expert}.w3", (i, d), "matrix")


def _attention_tensors(c: Config, layer: int) -> Iterator[Expected]:
    d, hd, ratio = c.hidden_size, c.head_dim, c.ratio(layer)
    group = c.heads_per_group * hd
    yield Expected("attn.attn_sink", (c.num_attention_heads,), "plain")
    yield Expected("attn.wq_a", (c.q_lora_rank, d), "matrix")
    yield Expected("attn.q_norm.weight", (c.q_lora_rank,), "plain")
    yield Expected("attn.wq_b", (c.num_attention_heads * hd, c.q_lora_rank), "matrix")
    yield Expected("attn.wkv", (hd, d), "matrix")
    yield Expected("attn.kv_norm.weight", (hd,), "plain")
    yield Expected("attn.wo_a", (c.o_groups * c.o_lora_rank, group), "matrix")
    yield Expected("attn.wo_b", (d, c.o_groups * c.o_lora_rank), "matrix")
    if ratio:
        yield from _compressor_tensors("attn.compressor", d, hd, ratio)
    if ratio == CSA_RATIO:
        heads, width = c.index_n_heads, c.index_head_dim
        yield Expected("attn.indexer.wq_b", (heads * width, c.q_lora_rank), "matrix")
        yield Expected("attn.indexer.weights_proj", (heads, d), "matrix")
        yield from _compressor_tensors("attn.indexer.compressor", d, width, ratio)


def _compressor_tensors(prefix: str, d: int, width: int, ratio: int) -> Iterator[Expected]:
    rows = 2 * width if ratio == CSA_RATIO else width
    yield Expected(f"{prefix}.wkv", (rows, d), "matrix")
    yield Expected(f"{prefix}.wgate", (rows, d), "matrix")
    yield Expected(f"{prefix}.ape", (ratio, rows), "plain")
    yield Expected(f"{prefix}.norm.weight", (width,), "plain")
