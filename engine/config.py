"""The model's configuration, with the field names of the released config.json.

`compress_ratios` decides everything about a layer's attention: 0 is sliding window only, 4 is CSA
(compressed sparse attention, with an indexer), 128 is HCA (heavily compressed attention).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import BadCheckpoint

CSA_RATIO = 4
HCA_RATIO = 128
# Beyond these a value is a mistake, and would be answered by running out of time or memory.
_LARGEST = {
    "num_hidden_layers": 4096,
    "n_routed_experts": 65536,
    "hc_mult": 64,
    "hc_sinkhorn_iters": 1000,
}
_LARGEST_INT = 2**31 - 1
# What the engine computes; a config that says otherwise belongs to another model.
_FIXED = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN parameters of the layers that have a compressor; ``factor`` 1 means plain RoPE."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Config:
    """DeepSeek-V4 hyperparameters. Defaults are V4-Flash."""

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    n_routed_experts: int = 256
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    routed_scaling_factor: float = 1.5
    num_hash_layers: int = 3
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: YarnScaling | None = field(default_factory=YarnScaling)
    max_position_embeddings: int = 1048576
    bos_token_id: int = 0
    eos_token_id: int = 1
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4)

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.o_groups

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def index_scale(self) -> float:
        """Factor on the indexer's per-head weights: index_head_dim^-0.5 * index_n_heads^-0.5."""
        return self.index_head_dim**-0.5 * self.index_n_heads**-0.5

    def ratio(self, layer: int) -> int:
        return self.compress_ratios[layer]

    def is_hash_layer(self, layer: int) -> bool:
        return layer < self.num_hash_layers

    def attention_kind(self, layer: int) -> str:
        return {0: "SWA", CSA_RATIO: "CSA"}.get(self.ratio(layer), "HCA")

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json spells them."""
        data = asdict(self)
        data["compress_ratios"] = [*self.compress_ratios, 0]  # one more for the MTP layer
        yarn = data.pop("rope_scaling")
        if yarn is not None:
            data["rope_scaling"] = {"type": "yarn", **yarn}
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **data,
            "num_key_value_heads": 1,
            "n_shared_experts": 1,
            "num_nextn_predict_layers": 0,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FLASH = Config()
PRO = Config(
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
    index_topk=1024,
    compress_ratios=(128, 128, *(4, 128) * 29, 4),
)
# Small enough for a laptop, with every attention and router kind and the real head sizes, which
# kernels are compiled for. index_topk 16 is passed after 64 tokens, so selection matters early.
TINY = Config(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=16,
    num_attention_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    index_n_heads=16,
    index_topk=16,
    max_position_embeddings=65536,
    compress_ratios=(0, 0, *(4, 128) * 7),
)
PRESETS = {"tiny": TINY, "flash": FLASH, "pro": PRO}


def with_layers(config: Config, layers: int) -> Config:
    """The same model cut to its first `layers` layers, or grown by repeating the last two kinds."""
    if layers < 1:
        raise ValueError(f"a model has at least one layer, not {layers}")
    ratios = list(config.compress_ratios)
    while len(ratios) < layers:
        ratios.append(ratios[-2])
    return replace(config, num_hidden_layers=layers, compress_ratios=tuple(ratios[:layers]))


def load_config(folder: Path) -> Config:
    """Read `folder`/config.json (released or transformers spelling) and validate it.

    Raises BadCheckpoint naming the field and its value.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(
            f"no config.json in {folder}", "CKPT is a folder with config.json and *.safetensors"
        ) from None
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}", "download it again") from None
    if not isinstance(data, dict):
        raise BadCheckpoint(
            f"{path} holds a JSON {type(data).__name__}", "config.json is a JSON object"
        )
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], where: str) -> Config:
    """Build a Config from the JSON object `data`; `where` names its source in errors."""
    for name, only in _FIXED.items():
        if data.get(name) not in (None, only):
            raise BadCheckpoint(
                f"{where}: {name} is {data[name]!r}", f"the engine knows {only!r} only"
            )
    values: dict[str, Any] = {}
    for spec in fields(Config):
        if spec.name in data and spec.name not in ("rope_scaling", "compress_ratios"):
            value = data[spec.name]
            if spec.name.endswith("_token_id") and (value is None or isinstance(value, list)):
                if not value:
                    continue  # null or []: the default
                value = value[0]  # several ids end a text; the first is the main one
            values[spec.name] = _typed(spec.name, value, spec.type, where)
    values["compress_ratios"] = _compress_ratios(data, where)
    values["rope_scaling"], thetas = _rope(data, where)
    values.update(thetas)
    if "num_hash_layers" not in data and isinstance(data.get("mlp_layer_types"), list):
        values["num_hash_layers"] = data["mlp_layer_types"].count("hash_moe")
    if "qk_rope_head_dim" not in data and "partial_rotary_factor" in data:
        factor = _typed("partial_rotary_factor", data["partial_rotary_factor"], "float", where)
        values["qk_rope_head_dim"] = int(values.get("head_dim", 512) * factor)
    config = Config(**values)
    _validate(config, where)
    layers = config.num_hidden_layers
    return replace(config, compress_ratios=config.compress_ratios[:layers])


def _typed(name: str, value: Any, kind: Any, where: str) -> Any:
    """`value` as int or float; whole floats such as 4096.0 count as int."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and abs(value) <= _LARGEST_INT:  # False for NaN
        if kind == "float":
            return float(value)
        if int(value) == value:
            return int(value)
    raise BadCheckpoint(
        f"{where}: {name} is {_short(value)}", f"{name} is {_ARTICLE[kind]} of at most 2^31 - 1"
    )


_ARTICLE = {"int": "a whole number", "float": "a number"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _compress_ratios(data: dict[str, Any], where: str) -> tuple[int, ...]:
    ratios = data.get("compress_ratios")
    if ratios is None and isinstance(data.get("layer_types"), list):
        unknown = sorted({str(t) for t in data["layer_types"]} - set(_LAYER_TYPES))
        if unknown:
            raise BadCheckpoint(
                f"{where}: layer_types has {unknown}", f"known: {sorted(_LAYER_TYPES)}"
            )
        ratios = [_LAYER_TYPES[t] for t in data["layer_types"]]
    if ratios is None:
        raise BadCheckpoint(
            f"{where}: neither compress_ratios nor layer_types is given",
            "the attention kind of a layer cannot be guessed (0 sliding, 4 CSA, 128 HCA)",
        )
    if not isinstance(ratios, list):
        raise BadCheckpoint(
            f"{where}: compress_ratios is {_short(ratios)}", "it is a list of one number a layer"
        )
    for layer, ratio in enumerate(ratios):
        if isinstance(ratio, bool) or ratio not in (0, CSA_RATIO, HCA_RATIO):
            raise BadCheckpoint(
                f"{where}: compress_ratios[{layer}] is {_short(ratio)}",
                "a layer's ratio is 0 (sliding window), 4 (CSA) or 128 (HCA)",
            )
    return tuple(int(ratio) for ratio in ratios)


def _rope(data: dict[str, Any], where: str) -> tuple[YarnScaling | None, dict[str, float]]:
    """YaRN settings and, from transformers' nested `rope_parameters`, the two bases."""
    thetas: dict[str, float] = {}
    nested = data.get("rope_parameters")
    scaling = data.get("rope_scaling")
    if isinstance(nested, dict) and isinstance(nested.get("compress"), dict):
        scaling = nested["compress"]
        for part, name in (("compress", "compress_rope_theta"), ("main", "rope_theta")):
            group = nested.get(part)
            if isinstance(group, dict) and "rope_theta" in group:
                label = f"rope_parameters.{part}.rope_theta"
                thetas[name] = _typed(label, group["rope_theta"], "float", where)
    if scaling is None:
        return None, thetas
    if not isinstance(scaling, dict):
        raise BadCheckpoint(
            f"{where}: rope_scaling is {_short(scaling)}", "it is an object with YaRN's parameters"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None, thetas
    if kind != "yarn":
        raise BadCheckpoint(f"{where}: rope_scaling type {kind!r}", "only yarn is known for V4")
    known = {
        spec.name: _typed(f"rope_scaling.{spec.name}", scaling[spec.name], spec.type, where)
        for spec in fields(YarnScaling)
        if spec.name in scaling
    }
    return YarnScaling(**known), thetas


def _validate(config: Config, where: str) -> None:
    """Raise BadCheckpoint with everything that cannot be a model."""
    problems = [*_out_of_range(config)]
    if not problems:  # the rest divides and compares
        problems = [*_contradictions(config)]
    if problems:
        raise BadCheckpoint(
            f"{where}: " + "; ".join(problems), "is it the config.json of a DeepSeek-V4 model?"
        )


def _out_of_range(config: Config) -> Iterator[str]:
    for spec in fields(Config):
        if spec.type not in ("int", "float"):
            continue
        value, least = getattr(config, spec.name), 0
        if spec.name in ("num_hash_layers", "bos_token_id", "eos_token_id"):
            least = -1
        if value <= least:
            yield f"{spec.name} is {value}, has to be above {least}"
        elif value > _LARGEST.get(spec.name, _LARGEST_INT):
            yield f"{spec.name} is {value}, at most {_LARGEST[spec.name]} can be right"
    for name in ("rope_theta", "compress_rope_theta"):
        if 0 < getattr(config, name) <= 1:
            yield f"{name} is {getattr(config, name)}, has to be above 1"
    if config.rope_scaling is not None:
        for name, value in asdict(config.rope_scaling).items():
            if value <= 0:
                yield f"rope_scaling.{name} is {value}, has to be above 0"


def _contradictions(c: Config) -> Iterator[str]:
    if len(c.compress_ratios) < c.num_hidden_layers:
        yield f"compress_ratios has {len(c.compress_ratios)} values for {c.num_hidden_layers} layers"
    if c.num_attention_heads % c.o_groups:
        yield f"{c.num_attention_heads} heads do not divide into {c.o_groups} o_groups"
    width = min(c.head_dim, c.index_head_dim)
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim > width:
        yield (
            f"qk_rope_head_dim is {c.qk_rope_head_dim}, has to be even and at most {width}, "
            "the smaller of head_dim and index_head_dim"
        )
    if c.num_experts_per_tok > c.n_routed_experts:
        yield f"num_experts_per_tok is {c.num_experts_per_tok} of {c.n_routed_experts} experts"
