"""Synthetic checkpoints: random weights with realistic ranges, written in every published layout.

Values are drawn per tensor from (seed, name), so a tensor does not depend on the layout, the order
of writing or the number of layers. They are made to exercise kernels: row scales that differ, zero
blocks, gate and up with unequal global scales, pre-activations beyond the clamp, sinks of both
signs, asymmetric mHC mixing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.formats import quantize_fp8_block, quantize_mxfp4, quantize_nvfp4
from dsv4_bench.engine.names import Expected, expected_tensors

LAYOUTS = {
    "nvfp4": "ModelOpt: routed experts NVFP4, dense FP8 128x128",
    "nvfp4-dense": "ModelOpt: experts and every dense linear NVFP4 (wo_a stays bf16)",
    "deepseek": "the original release: routed experts MXFP4, dense FP8 128x128",
    "compressed-tensors": "NVFP4 experts with reciprocal global scales, dense FP8 128x128",
    "bf16": "everything bfloat16, original names",
    "transformers": "everything bfloat16, transformers' names, experts stacked",
}
_SHARD_BYTES = 2 << 30
Progress = Callable[[str, int, int], None]


# ------------------------------------------------------------------------------ values


def make_tensor(config: Config, item: Expected, seed: int) -> Tensor:
    """The float32 (or int64) values of one expected tensor, [*item.shape]."""
    digest = hashlib.sha256(f"{seed}/{item.name}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if item.kind == "ids":
        order = torch.rand(item.shape[0], config.n_routed_experts, generator=rng).argsort(1)
        return order[:, : item.shape[1]].contiguous()
    if item.kind == "matrix":
        return _matrix(item, rng)
    return _plain(item, rng)


def _matrix(item: Expected, rng: torch.Generator) -> Tensor:
    n, k = item.shape
    leaf = item.name.rsplit(".", 1)[-1]
    if leaf == "embed":
        return torch.randn(n, k, generator=rng)
    gain = {"w1": 2.0, "w3": 1.25, "wgate": 1.5, "gate": 2.0}.get(leaf, 1.0)
    rows = torch.exp(0.3 * torch.randn(n, 1, generator=rng))  # channels of different strength
    weight = torch.randn(n, k, generator=rng) * rows * (gain / k**0.5)
    if leaf in ("w1", "w3"):
        weight[torch.randint(n, (max(1, n // 64),), generator=rng)] *= 4.0  # beyond the clamp
    if k % 32 == 0 and leaf in ("w1", "w2", "w3", "wq_b", "wo_b"):
        blocks = weight.view(n, k // 32, 32)
        blocks[torch.rand(n, k // 32, generator=rng) < 0.01] = 0.0
    return weight


def _plain(item: Expected, rng: torch.Generator) -> Tensor:
    value = torch.randn(item.shape, generator=rng)
    leaf = item.name.rsplit(".", 1)[-1]
    if leaf == "weight":
        return 1.0 + 0.1 * value  # norms
    if leaf == "attn_sink":
        return value * 1.5 + 0.5
    if leaf == "ape":
        return value * 0.5
    if leaf == "bias":
        return value * 0.05
    if leaf.endswith("_fn"):
        return value / item.shape[1] ** 0.5
    if leaf.endswith("_scale"):
        return 0.5 + 0.2 * value.abs()
    base = value * 0.7
    if item.shape[0] == 24:  # mHC: streams mostly keep themselves, and the mixing is not symmetric
        base[8:] += 2.0 * torch.eye(4).flatten() + torch.triu(torch.ones(4, 4), 1).flatten()
    return base


# ------------------------------------------------------------------------------ layouts


def encode(item: Expected, value: Tensor, layout: str) -> dict[str, Tensor]:
    """Stored tensors of one expected tensor, by original name plus the layout's companions."""
    if item.kind == "ids":
        return {item.name: value}
    if item.kind == "plain":
        dtype = torch.bfloat16 if item.name.endswith("norm.weight") else torch.float32
        return {item.name: value.to(dtype)}
    form = _matrix_format(item.name, layout)
    if form == "dense":
        return {f"{item.name}.weight": value.bfloat16()}
    if form == "fp8_block":
        data, scale = quantize_fp8_block(value)
        suffix = "weight_scale" if layout == "compressed-tensors" else "scale"
        return {f"{item.name}.weight": data, f"{item.name}.{suffix}": scale}
    if form == "mxfp4":
        data, scale = quantize_mxfp4(value)
        return {f"{item.name}.weight": data, f"{item.name}.scale": scale}
    data, scale, global_scale = quantize_nvfp4(value)
    input_scale = torch.tensor(4.0 / 2688)
    if layout == "compressed-tensors":
        return {
            f"{item.name}.weight_packed": data,
            f"{item.name}.weight_scale": scale,
            f"{item.name}.weight_global_scale": (1.0 / global_scale).reshape(1),
            f"{item.name}.input_global_scale": (1.0 / input_scale).reshape(1),
        }
    return {
        f"{item.name}.weight": data,
        f"{item.name}.weight_scale": scale,
        f"{item.name}.weight_scale_2": global_scale,
        f"{item.name}.input_scale": input_scale,
    }


_ALWAYS_DENSE = ("embed", "head", "gate", "weights_proj", "wgate")


def _matrix_format(name: str, layout: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    in_compressor = ".compressor." in name
    if layout in ("bf16", "transformers") or leaf in _ALWAYS_DENSE or in_compressor:
        return "dense"
    if ".ffn.experts." in name:
        return "mxfp4" if layout == "deepseek" else "nvfp4"
    if layout == "nvfp4-dense":
        return "dense" if leaf == "wo_a" else "nvfp4"
    return "fp8_block"


_HF_TOP = {"embed.": "model.embed_tokens.", "head.": "lm_head.", "hc_head_": "model.hc_head.hc_"}
_HF_BLOCK = {
    ".attn_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".hc_attn_": ".attn_hc.",
    ".hc_ffn_": ".ffn_hc.",
    ".ffn.gate.bias": ".mlp.gate.e_score_correction_bias",
    ".attn.indexer.compressor.": ".self_attn.compressor.indexer.",
    ".attn.indexer.weights_proj": ".self_attn.compressor.indexer.scorer.weights_proj",
    ".attn.indexer.wq_b": ".self_attn.compressor.indexer.q_b_proj",
    ".compressor.norm.": ".compressor.kv_norm.",
    ".indexer.norm.": ".indexer.kv_norm.",
    ".attn_sink": ".sinks",
    ".attn.": ".self_attn.",
    ".ffn.": ".mlp.",
    ".ape": ".position_bias",
    ".wq_a.": ".q_a_proj.",
    ".wq_b.": ".q_b_proj.",
    ".wkv.": ".kv_proj.",
    ".wgate.": ".gate_proj.",
    ".wo_a.": ".o_a_proj.",
    ".wo_b.": ".o_b_proj.",
    ".q_norm.": ".q_a_norm.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}


def transformers_name(name: str) -> str:
    """The original name of a tensor as transformers spells it."""
    for ours, theirs in _HF_TOP.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for ours, theirs in _HF_BLOCK.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


# ------------------------------------------------------------------------------ writing


def write_checkpoint(
    folder: Path, config: Config, layout: str, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Write a synthetic checkpoint to `folder`, which must not exist; shards of about 2 GB.

    Written beside it and renamed, so an interrupted run leaves nothing. Raises DSV4Error if the
    folder exists or the layout is unknown, CannotAnswer if the disk is full.
    """
    if layout not in LAYOUTS:
        raise DSV4Error(f"unknown layout {layout!r}", f"known: {', '.join(LAYOUTS)}")
    if folder.exists():
        raise DSV4Error(f"{folder} exists", "choose a new folder; nothing is overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CannotAnswer(f"cannot write {folder}: {error.strerror}") from None
    try:
        _write_shards(scratch, config, layout, seed, progress)
        (scratch / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        write_tokenizer(scratch / "tokenizer.json", config.vocab_size)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError as error:
        raise CannotAnswer(
            f"cannot write {folder}: {error.strerror or error}", "free some disk space"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _stored(config: Config, layout: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, by the name the layout gives it."""
    stack: dict[str, list[Tensor]] = {}
    for item in expected_tensors(config):
        for name, tensor in encode(item, make_tensor(config, item, seed), layout).items():
            if layout != "transformers":
                yield name, tensor
                continue
            prefix, found, rest = name.partition(".ffn.experts.")
            if not found:
                yield transformers_name(name), tensor
                continue
            expert, leaf = rest.split(".")[:2]
            stack.setdefault(leaf, []).append(tensor)
            if leaf == "w3" and int(expert) == config.n_routed_experts - 1:
                pairs = zip(stack["w1"], stack["w3"], strict=True)
                gate_up = torch.stack([torch.cat(pair) for pair in pairs])
                yield f"model.{prefix}.mlp.experts.gate_up_proj", gate_up
                yield f"model.{prefix}.mlp.experts.down_proj", torch.stack(stack["w2"])
                stack.clear()


def _write_shards(
    folder: Path, config: Config, layout: str, seed: int, progress: Progress | None
) -> None:
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = files = 0

    def flush() -> None:
        nonlocal size, files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    layer = -1
    for name, tensor in _stored(config, layout, seed):
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if progress and f".{layer + 1}." in name and "layers." in name:
            layer += 1
            progress("layer", layer + 1, config.num_hidden_layers)
        if size >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level tokenizer.json: id 0 begin, 1 end, then one id per byte. Needs vocab_size >= 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    if vocab_size < len(symbols) + len(special):
        return
    vocab = {symbol: i for i, symbol in enumerate([*special, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
