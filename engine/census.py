"""What a checkpoint holds, without running it: formats, roles, scale statistics, everything wrong.

Headers cover names, shapes and dtypes of every tensor. Scales are read by copying, so no page of a
checkpoint stays resident: all global scales, all scales of dense matrices, and the block scales of
the routed experts: of all of them where that is quick or asked for, else of three experts a layer.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4_bench.engine.checkpoint import Checkpoint, Matrix, bad_global
from dsv4_bench.engine.names import expected_tensors
from dsv4_bench.engine.shards import TensorInfo

Progress = Callable[[str, int, int], None]

_E4M3_TOP, _E4M3_NORMAL, _E8M0_NAN = 0x7E, 0x08, 0xFF  # 448; the smallest normal number; NaN
_QUICK_BYTES = 256 << 20  # as much as is always read of the experts' block scales
_FORMAT_WORDS = {
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "fp8_block": "FP8 128x128",
    "dense": "bf16",
}
_PRODUCERS = {
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
    "deepseek": "the original release",
    "transformers": "transformers (stacked experts)",
}


@dataclass
class Tally:
    """Stored tensors of one format: matrices with their companions, or plain tensors by dtype."""

    tensors: int = 0
    values: int = 0
    bytes: int = 0


@dataclass
class Role:
    """One kind of tensor, such as ``layers.*.attn.wq_a``, over all layers and experts."""

    role: str
    count: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    shapes: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class ScaleRange:
    """Scales of one layer's routed experts, or of all its other matrices.

    `at_max` and `subnormal` count e4m3 block scales of 448 and below 2^-6 (zero not counted);
    `gate_up` is the largest ratio between the global scales of w1 and w3 of one expert.
    """

    where: str
    scale_dtypes: set[str] = field(default_factory=set)
    read: int = 0  # block scales looked at
    total: int = 0  # block scales stored
    minimum: float = math.inf
    maximum: float = -math.inf
    e4m3: int = 0
    at_max: int = 0
    subnormal: int = 0
    zero: int = 0
    global_minimum: float = math.inf
    global_maximum: float = -math.inf
    gate_up: float | None = None
    gate_up_unequal: int = 0

    def add_blocks(self, dtype: str, data: bytes) -> None:
        """Count good scales; bad ones are left out of the range."""
        self.scale_dtypes.add(dtype)
        raw = np.frombuffer(data, dtype=np.uint8)
        if dtype == "F32":
            values = raw.view(np.float32)
            values = values[np.isfinite(values) & (values >= 0)]
            self.read += raw.size // 4
            self.zero += int(np.count_nonzero(values == 0))
            if values.size:
                self._range(float(values.min()), float(values.max()))
            return
        self.read += raw.size
        if dtype == "F8_E4M3":
            self._add_e4m3(raw if int(raw.max()) <= _E4M3_TOP else raw[raw <= _E4M3_TOP])
            return
        raw = raw if int(raw.max()) < _E8M0_NAN else raw[raw < _E8M0_NAN]
        if raw.size:
            self._range(2.0 ** (int(raw.min()) - 127), 2.0 ** (int(raw.max()) - 127))

    def _add_e4m3(self, raw: np.ndarray) -> None:
        """Non-negative e4m3 codes are ordered like their values."""
        if not raw.size:
            return
        zero = int(np.count_nonzero(raw == 0))
        self.e4m3 += raw.size
        self.zero += zero
        self.at_max += int(np.count_nonzero(raw == _E4M3_TOP))
        self.subnormal += int(np.count_nonzero(raw < _E4M3_NORMAL)) - zero
        self._range(e4m3_value(int(raw.min())), e4m3_value(int(raw.max())))

    def _range(self, low: float, high: float) -> None:
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def add_global(self, value: float) -> None:
        self.global_minimum = min(self.global_minimum, value)
        self.global_maximum = max(self.global_maximum, value)

    def to_dict(self) -> dict[str, Any]:
        def share(count: int) -> float | None:
            return count / self.e4m3 if self.e4m3 else None

        def known(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "where": self.where,
            "scale_dtypes": sorted(self.scale_dtypes),
            "block_scales": self.total,
            "read": self.read,
            "min": known(self.minimum),
            "max": known(self.maximum),
            "share_at_448": share(self.at_max),
            "share_subnormal": share(self.subnormal),
            "share_zero": share(self.zero),
            "global_min": known(self.global_minimum),
            "global_max": known(self.global_maximum),
            "gate_up_ratio": self.gate_up,
            "gate_up_unequal": self.gate_up_unequal,
        }


def e4m3_value(code: int) -> float:
    """The value of a non-negative, finite e4m3 code."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@dataclass
class Census:
    """Everything `inspect` says; `problems` empty means that the engine can use the checkpoint."""

    folder: str
    layout: str
    model: dict[str, Any]
    files: int
    tensors: int
    bytes: int
    formats: dict[str, Tally]
    roles: list[Role]
    scales: list[ScaleRange]
    coverage: dict[str, Any]
    notes: list[str]
    problems: list[str]
    extra: list[str]
    unused_mtp: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "formats": {name: vars(tally) for name, tally in self.formats.items()},
            "roles": [
                {**vars(r), "formats": dict(r.formats), "shapes": sorted(map(list, r.shapes))}
                for r in self.roles
            ],
            "scales": [row.to_dict() for row in self.scales],
        }


def take_census(
    checkpoint: Checkpoint, all_scales: bool = False, progress: Progress | None = None
) -> Census:
    """Look at all of `checkpoint`; `all_scales` reads the block scales of every expert.

    `progress` gets (what, tensors read, total). Raises BadCheckpoint only if a file cannot be read.
    """
    started = time.perf_counter()
    scan = _Scan(checkpoint, all_scales)
    scan.globals()
    scan.blocks(progress)
    scan.tables()
    infos = list(checkpoint.shards)
    notes = [*checkpoint.notes]
    if checkpoint.mtp:
        size = sum(info.nbytes for info in checkpoint.mtp)
        notes.append(
            f"{len(checkpoint.mtp)} MTP tensors ({size / 1e9:.2f} GB) are not used: "
            "the engine runs the main model"
        )
    if checkpoint.extra:
        notes.append(f"{len(checkpoint.extra)} tensors belong to nothing the engine knows")
    return Census(
        folder=str(checkpoint.folder),
        layout=layout_words(checkpoint),
        model=_model(checkpoint),
        files=len(checkpoint.shards.files),
        tensors=len(infos),
        bytes=sum(info.nbytes for info in infos),
        formats=_formats(checkpoint),
        roles=_roles(checkpoint),
        scales=list(scan.rows.values()),
        coverage=scan.coverage(),
        notes=notes,
        problems=[*checkpoint.problems, *scan.problems],
        extra=sorted(info.key for info in checkpoint.extra),
        unused_mtp=len(checkpoint.mtp),
        seconds=time.perf_counter() - started,
    )


# ------------------------------------------------------------------------------ headers only


def layout_words(checkpoint: Checkpoint) -> str:
    """Producer, formats and spelling in a line, decided from the tensors alone."""
    experts: Counter[tuple[str, str]] = Counter()
    dense: Counter[str] = Counter()
    for matrix in checkpoint.matrices.values():
        if ".ffn.experts." in matrix.name:
            experts[matrix.layout, matrix.format] += 1
        elif matrix.format != "dense":
            dense[matrix.format] += 1
    if not experts:
        return "unknown: no routed expert is complete"
    layout, expert_format = experts.most_common(1)[0][0]
    rest = dense.most_common(1)[0][0] if dense else "dense"
    if expert_format == "dense" and rest == "dense" and layout != "transformers":
        producer = "unquantised"
    else:
        producer = _PRODUCERS[layout]
    spelled = "transformers'" if _transformers_names(checkpoint) else "original"
    mixed = f" (and {len(experts) - 1} other formats)" if len(experts) > 1 else ""
    return (
        f"{producer}: routed experts {_FORMAT_WORDS[expert_format]}{mixed}, "
        f"other linears {_FORMAT_WORDS[rest]}, {spelled} tensor names"
    )


def _transformers_names(checkpoint: Checkpoint) -> bool:
    return any(".self_attn." in info.key for info in checkpoint.shards)


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    kinds = Counter(config.attention_kind(i) for i in range(config.num_hidden_layers))
    return {
        "layers": config.num_hidden_layers,
        "attention": dict(kinds),
        "hash_layers": min(config.num_hash_layers, config.num_hidden_layers),
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
    }


def _formats(checkpoint: Checkpoint) -> dict[str, Tally]:
    """Stored tensors by format; a stacked tensor counts once."""
    tallies: dict[str, Tally] = {}
    counted: set[str] = set()

    def add(name: str, infos: Iterable[TensorInfo], values: int) -> None:
        fresh = [info for info in infos if info.key not in counted]
        counted.update(info.key for info in fresh)
        tally = tallies.setdefault(name, Tally())
        tally.tensors += len(fresh)
        tally.values += values
        tally.bytes += sum(info.nbytes for info in fresh)

    for matrix in checkpoint.matrices.values():
        name = _format_name(matrix)
        add(name, matrix.roles.values(), math.prod(matrix.shape))
    for info in checkpoint.plain.values():
        add(info.dtype.lower(), [info], math.prod(info.shape))
    for name, infos in (("unused: MTP", checkpoint.mtp), ("unused: unknown", checkpoint.extra)):
        if infos:
            add(name, infos, 0)
    return dict(sorted(tallies.items(), key=lambda entry: -entry[1].bytes))


def _format_name(matrix: Matrix) -> str:
    return matrix.roles["data"].dtype.lower() if matrix.format == "dense" else matrix.format


_NUMBER = re.compile(r"\.\d+(?=\.)")


def _roles(checkpoint: Checkpoint) -> list[Role]:
    """What is there, in the order of the forward pass."""
    roles: dict[str, Role] = {}

    def add(name: str, form: str, shape: tuple[int, ...], nbytes: int) -> None:
        key = _NUMBER.sub(".*", name)
        role = roles.setdefault(key, Role(key))
        role.count += 1
        role.bytes += nbytes
        role.formats[form] += 1
        role.shapes.add(shape)

    for item in expected_tensors(checkpoint.config):
        matrix, info = checkpoint.matrices.get(item.name), checkpoint.plain.get(item.name)
        if matrix is not None:
            add(item.name, _format_name(matrix), matrix.shape, matrix.nbytes)
        elif info is not None:
            add(item.name, info.dtype.lower(), info.shape, info.nbytes)
    return list(roles.values())


# ------------------------------------------------------------------------------ scales


class _Scan:
    """Reads scales and tables; collects ranges by layer, and problems with coordinates."""

    def __init__(self, checkpoint: Checkpoint, all_scales: bool) -> None:
        self.checkpoint = checkpoint
        self.problems: list[str] = []
        self.rows: dict[str, ScaleRange] = {}
        count = checkpoint.config.n_routed_experts
        small = sum(i.nbytes for _, i in _expert_scales(checkpoint)) <= _QUICK_BYTES
        everything = range(count)
        self.experts = set(everything if all_scales or small else (0, count // 2, count - 1))

    def _row(self, name: str) -> ScaleRange:
        layer = re.match(r"layers\.(\d+)\.", name)
        where = f"L{layer[1]} " if layer else "top "
        where += "experts" if ".ffn.experts." in name else "other"
        return self.rows.setdefault(where, ScaleRange(where))

    def globals(self) -> None:
        """All global scales: one number a matrix, so none is left out."""
        matrices = [m for m in self.checkpoint.matrices.values() if m.format == "nvfp4"]
        wanted = [m.roles[r] for m in matrices for r in ("global", "input") if r in m.roles]
        scalars = self.checkpoint.shards.read_scalars(
            info for info in wanted if info.dtype == "F32" and info.nbytes == 4
        )
        multipliers: dict[str, float] = {}
        for matrix in matrices:
            for role in ("global", "input"):
                info = matrix.roles.get(role)
                if info is None or info.key not in scalars:
                    continue
                value = scalars[info.key]
                if bad_global(value):
                    self.problems.append(f"bad scale: {info.key} is {value}")
                elif role == "global":
                    inverse = matrix.layout == "compressed-tensors"
                    multipliers[matrix.name] = 1 / value if inverse else value
                    self._row(matrix.name).add_global(multipliers[matrix.name])
        self._gate_up(multipliers)

    def _gate_up(self, multipliers: dict[str, float]) -> None:
        for name, gate in multipliers.items():
            up = multipliers.get(f"{name[:-2]}w3") if name.endswith(".w1") else None
            if up is None:
                continue
            row = self._row(name)
            row.gate_up = max(row.gate_up or 1.0, gate / up, up / gate)
            row.gate_up_unequal += gate != up

    def blocks(self, progress: Progress | None) -> None:
        """Block scales of the dense matrices and of `self.experts`."""
        wanted: dict[str, tuple[TensorInfo, ScaleRange]] = {}
        for matrix in self.checkpoint.matrices.values():
            info = matrix.roles.get("scale")
            if info is None or matrix.format == "dense":
                continue
            row = self._row(matrix.name)
            row.total += math.prod(info.shape)
            if ".ffn.experts." not in matrix.name or _expert_of(matrix.name) in self.experts:
                wanted[info.key] = (info, row)
        shown = 0.0
        infos = [info for info, _ in wanted.values()]
        for done, (info, data) in enumerate(self.checkpoint.shards.read_bytes(infos), 1):
            row = wanted[info.key][1]
            row.add_blocks(_scale_dtype(info), data)
            self._check_blocks(info, data)
            if progress and (done == len(infos) or time.monotonic() - shown > 0.2):
                shown = time.monotonic()
                progress("reading block scales of tensor", done, len(infos))

    def _check_blocks(self, info: TensorInfo, data: bytes) -> None:
        raw = np.frombuffer(data, dtype=np.uint8)
        dtype = _scale_dtype(info)
        if dtype == "F32":
            values = raw.view(np.float32)
            bad = ~(np.isfinite(values) & (values >= 0))
        elif dtype == "F8_E4M3":
            if int(raw.max()) <= _E4M3_TOP:
                return
            bad = (raw > _E4M3_TOP) & (raw != 0x80)  # -0 is harmless
        else:
            bad = raw == _E8M0_NAN
        count = int(np.count_nonzero(bad))
        if count:
            first = int(bad.argmax())
            row, column = divmod(first, info.shape[-1])
            more = f" (and {count - 1} more in this tensor)" if count > 1 else ""
            value = _value_text(raw, first, dtype)
            self.problems.append(f"bad scale: {info.key} [{row}, {column}] is {value}{more}")

    def tables(self) -> None:
        """Expert ids of the hash layers have to be experts."""
        count = self.checkpoint.config.n_routed_experts
        tables = [i for n, i in self.checkpoint.plain.items() if n.endswith(".tid2eid")]
        for info, data in self.checkpoint.shards.read_bytes(tables):
            width = {"I64": np.int64, "I32": np.int32, "I16": np.int16}.get(info.dtype, np.uint16)
            ids = np.frombuffer(data, dtype=width)
            bad = (ids < 0) | (ids >= count)
            if bad.any():
                row, column = divmod(int(bad.argmax()), info.shape[-1])
                self.problems.append(
                    f"bad expert id: {info.key} [{row}, {column}] is {ids[bad.argmax()]}, "
                    f"the model has {count} experts"
                )

    def coverage(self) -> dict[str, Any]:
        read = sum(row.read for row in self.rows.values())
        total = sum(row.total for row in self.rows.values())
        count = self.checkpoint.config.n_routed_experts
        everything = len(self.experts) == count
        return {
            "block_scales_read": read,
            "block_scales": total,
            "share": read / total if total else 1.0,
            "experts": "all" if everything else sorted(self.experts),
            "global_scales": "all",
        }


def _expert_scales(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Name and block scales of every quantised matrix of a routed expert."""
    for name, matrix in checkpoint.matrices.items():
        if ".ffn.experts." in name and "scale" in matrix.roles:
            yield name, matrix.roles["scale"]


def _expert_of(name: str) -> int:
    return int(name.split(".ffn.experts.")[1].split(".")[0])


def _scale_dtype(info: TensorInfo) -> str:
    return "F8_E8M0" if info.dtype == "U8" else info.dtype  # some writers store bytes


def _value_text(raw: np.ndarray, index: int, dtype: str) -> str:
    if dtype == "F32":
        return str(float(raw.view(np.float32)[index]))
    code = int(raw[index])
    if dtype == "F8_E8M0" or code & 0x7F == 0x7F:
        return "nan"
    return str(-e4m3_value(code & 0x7F))
