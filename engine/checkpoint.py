"""Checkpoints in every published layout, behind the original tensor names.

The format of a matrix is decided from its dtype and companion tensors, never from config.json:
uint8 + e4m3 scales = NVFP4, packed bytes + e8m0 scales = MXFP4, e4m3 + block scales = FP8 128x128.
Opening reads only the headers; weights are memory-mapped when they are asked for.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config, load_config
from dsv4_bench.engine.errors import BadCheckpoint
from dsv4_bench.engine.formats import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, Weight
from dsv4_bench.engine.names import Expected, canonical, expected_tensors
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.shards import Shards, TensorInfo

_DENSE = ("BF16", "F32", "F16")
_BYTES = ("U8", "I8", "F4")


@dataclass
class Matrix:
    """How one matrix is stored: its format and the stored tensor of each role."""

    name: str
    format: str
    shape: tuple[int, int]
    roles: dict[str, TensorInfo] = field(default_factory=dict)
    layout: str = ""  # modelopt, compressed-tensors, deepseek: which companions it has
    part: slice | None = None  # row range in a stacked gate_up_proj
    index: int | None = None  # expert in a stacked tensor

    @property
    def nbytes(self) -> int:
        """Stored bytes; an equal share for one expert of a stacked tensor."""
        if self.index is not None:
            return 2 * math.prod(self.shape)
        return sum(info.nbytes for info in self.roles.values())


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: it would look through half a million new objects, none of
    them garbage, again and again, for half of the time that opening takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Checkpoint:
    """A folder with config.json and safetensors, opened lazily.

    `problems` lists everything missing or mis-shaped, `extra` the stored keys nobody asked for,
    `notes` what is unusual but fine. `require_complete()` raises if there are problems.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: Config = load_config(self.folder)
        with _collector_paused():
            self._open()

    def _open(self) -> None:
        self.shards = Shards(self.folder)
        self.notes: list[str] = list(self.shards.notes)
        self.problems: list[str] = []
        self.matrices: dict[str, Matrix] = {}
        self.plain: dict[str, TensorInfo] = {}
        self._by_name: dict[str, TensorInfo] = {}
        for info in self.shards:
            other = self._by_name.setdefault(canonical(info.key), info)
            if other is not info:
                self.problems.append(f"the same tensor twice: {other.key} and {info.key}")
        self._used: set[str] = set()
        for item in expected_tensors(self.config):
            self._place(item)
        self._note_wo_a()
        unused = [i for name, i in self._by_name.items() if name not in self._used]
        self.mtp = [info for info in unused if canonical(info.key).startswith("mtp.")]
        self.extra = [info for info in unused if not canonical(info.key).startswith("mtp.")]

    # -- what is there

    def _take(self, name: str) -> TensorInfo | None:
        info = self._by_name.get(name)
        if info is not None:
            self._used.add(name)
        return info

    def _place(self, item: Expected) -> None:
        if item.kind == "matrix":
            matrix = self._find_matrix(item.name, item.shape)
            if matrix is not None:
                self.matrices[item.name] = matrix
            return
        info = self._take(item.name)
        kinds = ("I64", "I32", "U16", "I16") if item.kind == "ids" else _DENSE
        if info is None:
            self.problems.append(f"missing: {item.name} {list(item.shape)}")
        elif info.shape != item.shape:
            self.problems.append(_mis_shaped(info, item.shape))
        elif info.dtype not in kinds:
            self.problems.append(f"wrong dtype: {info.key} is {info.dtype}, expected {kinds[0]}")
        else:
            self.plain[item.name] = info

    def _find_matrix(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        n, k = shape
        data = self._take(f"{name}.weight") or self._take(f"{name}.weight_packed")
        if data is None:
            return self._find_stacked(name, (n, k))
        scale = self._take(f"{name}.weight_scale") or self._take(f"{name}.scale")
        matrix = Matrix(name, "", (n, k), {"data": data})
        if scale is not None:
            matrix.roles["scale"] = scale
        for role, names in _COMPANIONS.items():
            found = next((i for i in (self._take(f"{name}.{s}") for s in names) if i), None)
            if found is not None:
                matrix.roles[role] = found
        problem = _decide_format(matrix)
        if problem:
            self.problems.append(problem)
            return None
        return matrix

    def _find_stacked(self, name: str, shape: tuple[int, int]) -> Matrix | None:
        """Expert matrices in transformers' stacked form: gate_up_proj [e, 2i, d], down_proj [e, d, i]."""
        prefix, _, leaf = name.rpartition(".")
        parent, _, expert = prefix.rpartition(".")
        if not expert.isdigit():
            self.problems.append(f"missing: {name}.weight {list(shape)}")
            return None
        down = leaf == "w2"
        info = self._take(f"{parent}.{'down_proj' if down else 'gate_up_proj'}")
        rows = shape[0] if down else 2 * shape[0]
        full = (self.config.n_routed_experts, rows, shape[1])
        if info is None:
            self.problems.append(f"missing: {name}.weight {list(shape)}")
        elif info.shape != full or info.dtype not in _DENSE:
            if expert == "0":
                self.problems.append(_mis_shaped(info, full))
        else:
            part = {"w1": slice(0, shape[0]), "w3": slice(shape[0], rows)}.get(leaf, slice(0, rows))
            roles = {"data": info}
            return Matrix(name, "dense", shape, roles, "transformers", part, int(expert))
        return None

    def _note_wo_a(self) -> None:
        """wo_a is missing from some NVFP4 sets; then it is used as stored, and said so."""
        groups: Counter[str] = Counter()
        for layer in range(self.config.num_hidden_layers):
            wo_a = self.matrices.get(f"layers.{layer}.attn.wo_a")
            wo_b = self.matrices.get(f"layers.{layer}.attn.wo_b")
            if wo_a is None or wo_b is None:
                continue
            if wo_a.format == "fp8_block" and "scale" not in wo_a.roles:
                groups["has no scale: its e4m3 values are used as stored, scale 1"] += 1
            elif wo_b.format == "nvfp4" and wo_a.format != "nvfp4":
                groups[f"is not in the NVFP4 set: used as stored, {wo_a.format}"] += 1
        self.notes += [f"attn.wo_a {text} ({count} layers)" for text, count in groups.items()]

    def require_complete(self) -> None:
        """Raise BadCheckpoint with every problem (the first 12 in full) in one message."""
        if self.problems:
            shown = "; ".join(self.problems[:12])
            more = len(self.problems) - 12
            tail = f"; and {more} more" if more > 0 else ""
            raise BadCheckpoint(
                f"{self.folder}: {len(self.problems)} problems: {shown}{tail}",
                "`dsv4-bench inspect` lists them all",
            )

    # -- reading

    def tensor(self, name: str) -> Tensor:
        """A norm, bias, table or other small tensor by its original name."""
        info = self.plain.get(name)
        if info is None:
            raise BadCheckpoint(f"{self.folder}: missing: {name}")
        return self.shards.read(info.key)

    def weight(self, name: str) -> Weight:
        """A matrix by its original prefix (``layers.0.attn.wq_a``), as stored and mapped.

        Raises BadCheckpoint if a scale is NaN, negative or infinite.
        """
        matrix = self.matrices.get(name)
        if matrix is None:
            raise BadCheckpoint(f"{self.folder}: missing: {name}.weight")
        data = self.shards.read(matrix.roles["data"].key)
        if matrix.index is not None:
            data = data[matrix.index, matrix.part]
        if matrix.format == "dense":
            return Weight(name, "dense", data)
        scale = self._block_scale(matrix)
        if matrix.format in ("nvfp4", "mxfp4"):
            data = data.view(torch.uint8)
        return Weight(
            name, matrix.format, data, scale, self._global(matrix, "global"), self._input(matrix)
        )

    def _block_scale(self, matrix: Matrix) -> Tensor:
        info = matrix.roles.get("scale")
        if info is None:  # wo_a without a scale
            n, k = matrix.shape
            return torch.ones(-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
        scale = self.shards.read(info.key)
        if info.dtype == "U8":  # some writers store e8m0 as plain bytes
            scale = scale.view(torch.float8_e8m0fnu)
        bad = bad_scales(scale)
        if bad is not None:
            row, column, value = bad
            raise BadCheckpoint(
                f"{info.key} [{row}, {column}] is {value}",
                "block scales are finite and not negative",
            )
        return scale

    def _global(self, matrix: Matrix, role: str) -> float:
        info = matrix.roles.get(role)
        if info is None:
            return 1.0
        stored = self.shards.read(info.key).float().reshape(-1)
        value = float(stored[0])
        if bad_global(value):
            raise BadCheckpoint(f"{info.key} is {value}", "global scales are finite and positive")
        if matrix.layout == "compressed-tensors":  # stored as a reciprocal
            return float((1.0 / stored[0].double()).float())
        return value

    def _input(self, matrix: Matrix) -> float | None:
        return self._global(matrix, "input") if "input" in matrix.roles else None

    def expert(self, layer: int, expert: int | None) -> Expert:
        """Routed expert `expert` of `layer`, or its shared expert (None)."""
        middle = "shared_experts" if expert is None else f"experts.{expert}"
        prefix = f"layers.{layer}.ffn.{middle}."
        return Expert(*(self.weight(prefix + leaf) for leaf in Expert._fields))

    def experts(self, layer: int, device: torch.device | str = "cpu") -> Experts:
        return Experts(self, layer, torch.device(device))

    def shared_expert(self, layer: int, device: torch.device | str = "cpu") -> Expert:
        return Expert(*(w.to(torch.device(device)) for w in self.expert(layer, None)))


class Experts:
    """The routed experts of one layer; an expert is opened when it is first asked for."""

    def __init__(self, checkpoint: Checkpoint, layer: int, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.layer = layer
        self.device = device
        self._loaded: dict[int, Expert] = {}

    def __len__(self) -> int:
        return self.checkpoint.config.n_routed_experts

    def __getitem__(self, expert: int) -> Expert:
        if expert not in self._loaded:
            stored = self.checkpoint.expert(self.layer, expert)
            self._loaded[expert] = Expert(*(w.to(self.device) for w in stored))
        return self._loaded[expert]

    def stored_as(self, expert: int) -> tuple[str, ...]:
        """The stored dtypes of w1, w2 and w3 and their companions, without opening them: experts for
        which it is the same have the same size."""
        prefix = f"layers.{self.layer}.ffn.experts.{expert}."
        matrices = (self.checkpoint.matrices[prefix + leaf] for leaf in Expert._fields)
        return tuple(f"{role} {info.dtype}" for m in matrices for role, info in m.roles.items())

    def moved(self, move: Callable[[Expert], Expert]) -> Experts:
        """The same experts, all opened now, each as `move` returns it."""
        bank = Experts(self.checkpoint, self.layer, self.device)
        bank._loaded = {expert: move(self[expert]) for expert in range(len(self))}
        return bank


# ModelOpt's and compressed-tensors' names of the two global scales.
_COMPANIONS = {
    "global": ("weight_scale_2", "weight_global_scale"),
    "input": ("input_scale", "input_global_scale"),
}


def _decide_format(matrix: Matrix) -> str | None:
    """Set `format` and `layout` from dtypes and companions; returns what is wrong, or None."""
    n, k = matrix.shape
    data, scale = matrix.roles["data"], matrix.roles.get("scale")
    packed = (n, k) if data.dtype == "F4" else (n, k // 2)
    if data.dtype in _DENSE:
        matrix.format, stored, scales = "dense", (n, k), None
    elif data.dtype == "F8_E4M3":
        matrix.format, stored = "fp8_block", (n, k)
        scales = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
        if scale is None and matrix.name.endswith(".wo_a"):
            scales = None
    elif data.dtype in _BYTES and scale is not None and scale.dtype == "F8_E4M3":
        matrix.format, stored, scales = "nvfp4", packed, (n, k // NVFP4_BLOCK)
    elif data.dtype in _BYTES and scale is not None and scale.dtype in ("F8_E8M0", "U8"):
        matrix.format, stored, scales = "mxfp4", packed, (n, k // MXFP4_BLOCK)
    elif data.dtype in _BYTES and scale is None:
        return f"missing: {matrix.name}.weight_scale (or .scale) beside {data.key} ({data.dtype})"
    else:
        with_scale = f" with scale {scale.dtype}" if scale else ""
        return f"unknown format: {data.key} is {data.dtype}{with_scale}"
    if matrix.name == "embed" and matrix.format != "dense":
        return f"wrong dtype: {data.key} is {data.dtype}, expected BF16"
    if data.shape != stored:
        return _mis_shaped(data, stored)
    if scales is not None:
        if scale is None:
            return f"missing: {matrix.name}.scale {list(scales)} beside {data.key} ({data.dtype})"
        if scale.shape != scales:
            return _mis_shaped(scale, scales)
        if matrix.format == "fp8_block" and scale.dtype not in ("F8_E8M0", "U8", "F32"):
            return f"wrong dtype: {scale.key} is {scale.dtype}, expected F8_E8M0 or F32"
    return _decide_layout(matrix)


def _decide_layout(matrix: Matrix) -> str | None:
    matrix.layout = "deepseek"
    if matrix.format != "nvfp4":
        return None
    data, scale = matrix.roles["data"], matrix.roles.get("global")
    if scale is None:
        return f"missing: {matrix.name}.weight_scale_2 beside {data.key} (NVFP4)"
    if math.prod(scale.shape) != 1 or scale.dtype != "F32":
        return f"wrong shape: {scale.key} is {scale.dtype} {list(scale.shape)}, expected one F32"
    reciprocal = scale.key.endswith("weight_global_scale")
    matrix.layout = "compressed-tensors" if reciprocal else "modelopt"
    return None


def _mis_shaped(info: TensorInfo, wanted: tuple[int, ...]) -> str:
    return f"wrong shape: {info.key} is {list(info.shape)}, expected {list(wanted)}"


def bad_global(value: float) -> bool:
    """Whether a global scale cannot be used: NaN, infinite, negative or zero."""
    return not (math.isfinite(value) and value > 0)


def bad_scales(scale: Tensor) -> tuple[int, int, float] | None:
    """First (row, column, value) of a block scale that is NaN, infinite or negative, or None."""
    if scale.dtype == torch.float8_e8m0fnu:
        bad = scale.view(torch.uint8) == 255
    elif scale.dtype == torch.float8_e4m3fn:
        bad = scale.view(torch.uint8) > 0x7E  # 0x7F is NaN, from 0x80 on negative
        bad &= scale.view(torch.uint8) != 0x80  # -0 is harmless
    else:
        bad = ~(torch.isfinite(scale) & (scale >= 0))
    if not bool(bad.any()):
        return None
    row, column = (int(i) for i in bad.nonzero()[0])
    return row, column, float(scale[row, column].float())
