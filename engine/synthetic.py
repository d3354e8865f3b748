"""Synthetic checkpoints: random weights with realistic ranges, written in every published layout.

Values are drawn per tensor from (seed, name), so a tensor does not depend on the layout, the order
of writing or the number of layers. They are made to exercise kernels: row scales that differ, zero
blocks and blocks whose NVFP4 scale is at the subnormal end, gate and up with unequal global scales,
pre-activations beyond the clamp, sinks of both signs, asymmetric mHC mixing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, did_you_mean
from dsv4_bench.engine.formats import quantize_fp8_block, quantize_mxfp4, quantize_nvfp4
from dsv4_bench.engine.names import Expected, expected_tensors
from dsv4_bench.engine.shards import INDEX

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
    return _plain(item, config.hc_mult, rng)


def _matrix(item: Expected, rng: torch.Generator) -> Tensor:
    n, k = item.shape
    leaf = item.name.rsplit(".", 1)[-1]
    weight = torch.randn(n, k, generator=rng)
    if leaf == "embed":
        return weight
    gain = {"w1": 2.0, "w3": 1.25, "wgate": 1.5, "gate": 2.0}.get(leaf, 1.0)
    weight *= torch.exp(0.3 * torch.randn(n, 1, generator=rng))  # channels of different strength
    weight *= gain / k**0.5
    if leaf in ("w1", "w3"):
        weight[torch.randint(n, (max(1, n // 64),), generator=rng)] *= 4.0  # beyond the clamp
    if k % 32 == 0 and leaf in ("w1", "w2", "w3", "wq_b", "wo_b"):
        blocks = weight.view(n, k // 32, 32)
        chance = torch.rand(n, k // 32, generator=rng)
        blocks[chance < 0.01] = 0.0
        blocks[chance > 0.998] *= 2.0**-16  # NVFP4 block scales at 2^-9, the smallest there is
    return weight


def _plain(item: Expected, hc: int, rng: torch.Generator) -> Tensor:
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
    if item.shape[0] > hc:  # mHC: streams mostly keep themselves, and the mixing is not symmetric
        base[2 * hc :] += (2.0 * torch.eye(hc) + torch.triu(torch.ones(hc, hc), 1)).flatten()
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
    """Write a synthetic checkpoint to `folder`, which must not exist; shards of at most 2 GiB.

    Written beside it and renamed, so an interrupted run leaves nothing. One matrix is made at a
    time and one shard held in memory (layout `transformers`: one layer's experts). `progress` gets
    (what, tensors done, total) a few times a second. Raises DSV4Error if the folder exists or the
    layout is unknown, CannotAnswer if the place cannot be written or has not enough space.
    """
    if layout not in LAYOUTS:
        raise DSV4Error(f"unknown layout {layout!r}", did_you_mean(layout, LAYOUTS))
    if folder.exists() or folder.is_symlink():
        raise DSV4Error(f"{folder} exists", "choose a new folder; nothing is overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        _check_space(folder, config, layout)
        _write_shards(scratch, config, layout, seed, progress)
        (scratch / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        write_tokenizer(scratch / "tokenizer.json", config.vocab_size)
        _share(scratch)
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _cannot_write(folder: Path, error: OSError | SafetensorError) -> DSV4Error:
    """What to say about a failed write; safetensors reports a full disk in its text only."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOTEMPTY, errno.EEXIST) and folder.exists():  # made by another meanwhile
        return DSV4Error(f"{folder} exists", "choose a new folder; nothing is overwritten")
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    hint = "free some disk space, or choose another disk" if full else "choose another place"
    return CannotAnswer(f"cannot write {folder}: {text}", hint)


def _share(folder: Path) -> None:
    """Give folder and files the permissions that the user's umask grants; they are made private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


_BITS = {"dense": 16.0, "fp8_block": 8.0, "mxfp4": 4.25, "nvfp4": 4.5}  # a value, with block scales


def estimated_bytes(config: Config, layout: str) -> int:
    """About how large the checkpoint will be: the values and block scales of all tensors."""
    bits = 0.0
    for item in expected_tensors(config):
        width = 64.0 if item.kind == "ids" else 32.0
        if item.kind == "matrix":
            width = _BITS[_matrix_format(item.name, layout)]
        bits += width * math.prod(item.shape)
    return int(bits / 8)


def _check_space(folder: Path, config: Config, layout: str) -> None:
    needed, free = estimated_bytes(config, layout), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise CannotAnswer(
            f"cannot write {folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            "fewer layers, a smaller preset, or another disk",
        )


def _stored(item: Expected, config: Config, layout: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one expected tensor, by the name the layout gives them."""
    for name, tensor in encode(item, make_tensor(config, item, seed), layout).items():
        yield (transformers_name(name) if layout == "transformers" else name), tensor


class _Stack:
    """Collects the routed experts of a layer into transformers' two stacked tensors."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gate_up = self.down = torch.empty(0)

    def add(self, item: Expected, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take one expert matrix; yields the stacked tensors once the layer is complete."""
        prefix, _, rest = item.name.partition(".ffn.experts.")
        number, leaf = rest.split(".")
        expert, count = int(number), self.config.n_routed_experts
        i, d = self.config.moe_intermediate_size, self.config.hidden_size
        if not self.down.numel():
            self.gate_up = torch.empty(count, 2 * i, d, dtype=torch.bfloat16)
            self.down = torch.empty(count, d, i, dtype=torch.bfloat16)
        rows = {"w1": self.gate_up[:, :i], "w3": self.gate_up[:, i:], "w2": self.down}[leaf]
        rows[expert] = value.bfloat16()
        if leaf == "w3" and expert == count - 1:
            yield f"model.{prefix}.mlp.experts.gate_up_proj", self.gate_up
            yield f"model.{prefix}.mlp.experts.down_proj", self.down
            self.gate_up = self.down = torch.empty(0)


class _Shards:
    """Writes tensors to safetensors files of at most `limit` bytes, and their index."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.total = self._size = 0
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # the keys of each file

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._size + tensor.nbytes > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self.total += tensor.nbytes

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending.clear()
        self._size = 0

    def finish(self) -> None:
        """Name the files after their number, which is known only now, and write the index."""
        if self._pending:
            self._flush()
        weight_map = {}
        for number, keys in enumerate(self._files):
            name = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=0) + "\n")


def _write_shards(
    folder: Path, config: Config, layout: str, seed: int, progress: Progress | None
) -> None:
    items = list(expected_tensors(config))
    shards, stack = _Shards(folder, _SHARD_BYTES), _Stack(config)
    shown = -math.inf
    for done, item in enumerate(items):
        if progress and time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            progress("writing tensors", done, len(items))
        if layout == "transformers" and ".ffn.experts." in item.name:
            stored = stack.add(item, make_tensor(config, item, seed))
        else:
            stored = _stored(item, config, layout, seed)
        for name, tensor in stored:
            shards.add(name, tensor)
    shards.finish()
    if progress:
        progress("writing tensors", len(items), len(items))


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
