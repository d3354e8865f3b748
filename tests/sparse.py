"""A V4-Flash checkpoint with real names and shapes, 168 GB long and a few tens of MB on disk.

ModelOpt's NVFP4 layout: routed experts NVFP4, dense FP8 128x128, MTP as released. Files are header
plus a hole, so every weight reads as zero; only the float32 scalars and one row of the hash tables
are written. As a script it measures `inspect` and the first layer, each in a fresh process:

    python tests/sparse.py FOLDER
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv4_bench.engine.config import FLASH, Config
from dsv4_bench.engine.names import expected_tensors

_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I64": 8}
_DENSE = ("embed", "head", "gate", "weights_proj", "wgate")
SHARD_BYTES = 5_000_000_000
TOKEN = 7  # the token whose row of the hash tables names different experts


class Stored(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _BYTES[self.dtype] * math.prod(self.shape)


def flash_tensors(config: Config, mtp: bool = True) -> Iterator[Stored]:
    """Every stored tensor of the ModelOpt NVFP4 release of `config`."""
    for item in expected_tensors(config):
        if item.kind == "ids":
            yield Stored(item.name, "I64", item.shape)
        elif item.kind == "plain":
            norm = item.name.endswith("norm.weight")
            yield Stored(item.name, "BF16" if norm else "F32", item.shape)
        elif ".ffn.experts." in item.name:
            yield from _nvfp4(item.name, *item.shape)
        elif item.name.rsplit(".", 1)[-1] in _DENSE or ".compressor." in item.name:
            yield Stored(f"{item.name}.weight", "BF16", item.shape)
        else:
            yield from _fp8(item.name, *item.shape)
    if mtp:
        yield from _mtp(config)


def _nvfp4(name: str, n: int, k: int) -> Iterator[Stored]:
    yield Stored(f"{name}.weight", "U8", (n, k // 2))
    yield Stored(f"{name}.weight_scale", "F8_E4M3", (n, k // 16))
    yield Stored(f"{name}.weight_scale_2", "F32", ())
    yield Stored(f"{name}.input_scale", "F32", ())


def _fp8(name: str, n: int, k: int) -> Iterator[Stored]:
    yield Stored(f"{name}.weight", "F8_E4M3", (n, k))
    yield Stored(f"{name}.scale", "F8_E8M0", (-(-n // 128), -(-k // 128)))


def _mtp(c: Config) -> Iterator[Stored]:
    """The experts and projections of the draft layer, which stay MXFP4 and FP8."""
    d, i = c.hidden_size, c.moe_intermediate_size
    for expert in range(c.n_routed_experts):
        for leaf, n, k in (("w1", i, d), ("w2", d, i), ("w3", i, d)):
            yield Stored(f"mtp.0.ffn.experts.{expert}.{leaf}.weight", "I8", (n, k // 2))
            yield Stored(f"mtp.0.ffn.experts.{expert}.{leaf}.scale", "F8_E8M0", (n, k // 32))
    yield from _fp8("mtp.0.e_proj", d, d)
    yield from _fp8("mtp.0.h_proj", d, d)
    for leaf in ("enorm", "hnorm", "norm"):
        yield Stored(f"mtp.0.{leaf}.weight", "BF16", (d,))


def write_sparse_checkpoint(folder: Path, config: Config = FLASH, mtp: bool = True) -> int:
    """Write it to the new `folder`; returns the total length of the shards in bytes."""
    folder.mkdir(parents=True)
    shards: list[list[Stored]] = []
    room = 0
    for stored in flash_tensors(config, mtp):
        if room < stored.nbytes or not shards:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(stored)
        room -= stored.nbytes
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, tensors, config)
        weight_map.update(dict.fromkeys((t.key for t in tensors), name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return total


def _write_shard(path: Path, tensors: list[Stored], config: Config) -> int:
    # As safetensors' own writer: wide types first, so that the scalars lie together.
    ordered = sorted(tensors, key=lambda t: (-_BYTES[t.dtype], t.key))
    header, offset, values = {}, 0, []
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        if tensor.dtype == "F32" and not tensor.shape:
            values.append((offset, struct.pack("<f", 1e-4)))
        elif tensor.dtype == "I64":
            row = range(1, 1 + config.num_experts_per_tok)
            values.append((offset + 8 * TOKEN * len(row), struct.pack(f"<{len(row)}q", *row)))
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
        for start, value in values:
            file.seek(8 + len(raw) + start)
            file.write(value)
    return offset


_INSPECT = """
from dsv4_bench.workbench.cli import main
assert main(["inspect", {folder!r}]) == 0
"""
_LAYER = """
import torch
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.model import Transformer
model = Transformer(Checkpoint({folder!r}))
cache = model.new_cache()
step = cache.step([[{token}]])
with torch.inference_mode():
    x = model.layers[0](model.embed(step.tokens), cache.layers[0], step)
assert x.isfinite().all()
"""
_MEASURE = """
import json, re, time
start = time.perf_counter()
{code}
# Not ru_maxrss: that one starts at the memory of the process that was forked.
with open("/proc/self/status") as status:
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) * 1024
print(json.dumps({{"seconds": time.perf_counter() - start, "peak_bytes": peak}}))
"""


def measure(what: str, folder: Path) -> dict[str, float]:
    """Run `inspect` or `layer` in a fresh interpreter: seconds (imports included), peak memory."""
    code = {"inspect": _INSPECT, "layer": _LAYER}[what].format(folder=str(folder), token=TOKEN)
    command = [sys.executable, "-c", _MEASURE.format(code=code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not target.exists():
        print(f"{write_sparse_checkpoint(target) / 1e9:.1f} GB")
    for what in ("inspect", "layer"):
        result = measure(what, target)
        print(f"{what}: {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e9:.2f} GB")
