"""config.json: the released and transformers' spelling, and everything that cannot be a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_config

from dsv4_bench.engine.config import (
    FLASH,
    PRESETS,
    PRO,
    TINY,
    Config,
    YarnScaling,
    load_config,
    parse_config,
    with_layers,
)
from dsv4_bench.engine.errors import BadCheckpoint

# The released V4-Flash config.json, field by field (without what the engine does not use).
RELEASED_FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}


def parse(**changes: Any) -> Config:
    return parse_config({**RELEASED_FLASH, **changes}, "config.json")


def test_the_released_flash_config_is_the_flash_preset() -> None:
    assert parse() == FLASH
    kinds = [FLASH.attention_kind(i) for i in range(43)]
    assert [kinds.count(k) for k in ("SWA", "CSA", "HCA")] == [2, 21, 20]
    assert kinds[:5] == ["SWA", "SWA", "CSA", "HCA", "CSA"]
    assert [FLASH.is_hash_layer(i) for i in range(4)] == [True, True, True, False]


def test_the_pro_preset_has_the_released_pattern() -> None:
    kinds = [PRO.attention_kind(i) for i in range(61)]
    assert [kinds.count(k) for k in ("SWA", "CSA", "HCA")] == [0, 30, 31]
    assert kinds[:4] == ["HCA", "HCA", "CSA", "HCA"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    config = PRESETS[name]
    assert parse_config(json.loads(json.dumps(config.to_json())), "x") == config


@pytest.mark.parametrize("config", [FLASH, TINY, SMALL, replace(SMALL, rope_scaling=None)])
def test_a_config_saved_by_transformers_is_understood(config: Config) -> None:
    """transformers writes rope_parameters, layer_types and mlp_layer_types instead."""
    saved = json.loads(transformers_config(config).to_json_string(use_diff=False))
    wanted = replace(config, bos_token_id=0, eos_token_id=1)
    got = parse_config({**saved, "bos_token_id": 0, "eos_token_id": 1}, "x")
    assert got == wanted
    assert (
        "compress_ratios" not in saved
        or parse_config(
            {k: v for k, v in saved.items() if k != "compress_ratios"}, "x"
        ).compress_ratios
        == config.compress_ratios
    )


def test_layer_types_stand_in_for_compress_ratios() -> None:
    data = {
        k: v for k, v in RELEASED_FLASH.items() if k not in ("compress_ratios", "num_hash_layers")
    }
    data["num_hidden_layers"] = 3
    data["layer_types"] = [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ]
    data["mlp_layer_types"] = ["hash_moe", "moe", "moe"]
    config = parse_config(data, "x")
    assert config.compress_ratios == (0, 4, 128)
    assert config.num_hash_layers == 1


def test_lenient_spellings() -> None:
    assert parse(hidden_size=4096.0) == FLASH
    assert parse(eos_token_id=[1, 2]) == FLASH
    assert parse(eos_token_id=None) == FLASH
    assert parse(rope_scaling=None).rope_scaling is None
    assert parse(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert parse(rope_scaling={"type": "yarn", "factor": 8}).rope_scaling == YarnScaling(factor=8.0)
    assert parse(num_hidden_layers=2).compress_ratios == (0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deepseek_v3"}, ["model_type", "deepseek_v3"]),
        ({"hidden_size": -4096}, ["hidden_size", "-4096"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"hidden_size": 1e18}, ["hidden_size", "1e+18"]),
        ({"hidden_size": 10**18}, ["hidden_size", "1000000000000000000"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": 4096.5}, ["hidden_size", "4096.5"]),
        ({"hidden_size": [4096]}, ["hidden_size", "[4096]"]),
        ({"n_routed_experts": 10**9}, ["n_routed_experts", "1000000000"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "1000000"]),
        ({"num_hidden_layers": 44, "compress_ratios": [0] * 43}, ["43 values for 44 layers"]),
        ({"hc_sinkhorn_iters": 10**7}, ["hc_sinkhorn_iters", "10000000"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "0.0"]),
        ({"swiglu_limit": "10"}, ["swiglu_limit", "'10'"]),
        ({"num_hash_layers": -1}, ["num_hash_layers", "-1"]),
        ({"num_experts_per_tok": 257}, ["257 of 256"]),
        ({"o_groups": 7}, ["64 heads", "7 o_groups"]),
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim", "63"]),
        ({"qk_rope_head_dim": 256}, ["qk_rope_head_dim", "256", "128"]),
        ({"compress_ratios": [0, 8] + [4] * 41}, ["compress_ratios[1]", "8"]),
        ({"compress_ratios": [0, True] + [4] * 41}, ["compress_ratios[1]", "True"]),
        ({"compress_ratios": [0, [4]] + [4] * 41}, ["compress_ratios[1]", "[4]"]),
        ({"compress_ratios": "44"}, ["compress_ratios", "'44'"]),
        ({"compress_ratios": None}, ["neither compress_ratios nor layer_types"]),
        ({"compress_ratios": None, "layer_types": ["full_attention"]}, ["full_attention"]),
        ({"compress_ratios": None, "layer_types": [{}]}, ["{}"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "linear"]),
        ({"rope_scaling": {"type": "yarn", "factor": "16"}}, ["rope_scaling.factor", "'16'"]),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 0}}, ["rope_scaling.beta_fast", "0.0"]),
        ({"compress_rope_theta": 1.0}, ["compress_rope_theta", "1.0"]),
        ({"rope_parameters": {"compress": {"rope_theta": "x"}}}, ["rope_theta", "'x'"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "True"]),
        ({"eos_token_id": ["</s>"]}, ["eos_token_id", "'</s>'"]),
    ],
)
def test_what_cannot_be_a_model_is_said_with_name_and_value(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        parse(**changes)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 4


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(BadCheckpoint) as caught:
        parse(hidden_size=0, head_dim=-1, o_groups=0)
    message = caught.value.message
    assert all(name in message for name in ("hidden_size", "head_dim", "o_groups"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "list"),
        (b"null", "NoneType"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(BadCheckpoint, match=words) as caught:
        load_config(tmp_path)
    assert caught.value.hint


def test_with_layers_cuts_and_grows() -> None:
    assert with_layers(FLASH, 3).compress_ratios == (0, 0, 4)
    assert with_layers(FLASH, 46).compress_ratios[-4:] == (4, 128, 4, 128)
    with pytest.raises(ValueError, match="0"):
        with_layers(FLASH, 0)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**18, -(10**18), 10**400, 2**31, 4, 128, "yarn", "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_FIELDS = [
    *RELEASED_FLASH, "rope_parameters", "layer_types", "mlp_layer_types", "partial_rotary_factor",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=5), st.sets(st.sampled_from(_FIELDS))
)
def test_any_config_parses_or_is_a_bad_checkpoint(changes: dict[str, Any], gone: set[str]) -> None:
    data = {k: v for k, v in RELEASED_FLASH.items() if k not in gone} | changes
    try:
        config = parse_config(data, "config.json")
    except BadCheckpoint as error:
        assert error.message
        return
    assert len(config.compress_ratios) == config.num_hidden_layers
    assert config.hidden_size > 0
