"""Arguments of ops as JSON: tensors as views of stored memory, weights as the checkpoint has them.

tensor   {"kind", "file", "storage", "dtype", "shape", "stride", "offset"}
weight   {"kind", "name", "format", "data": tensor, "scale": tensor | null,
          "global_scale": number, "input_scale": number | null}
expert   {"kind", "w1": weight, "w2": weight, "w3": weight}
experts  {"kind", "count", "experts": {"<id>": expert}}      only those that were used
step     {"kind", "tokens": tensor, "starts", "lengths", "window"}
dtype    {"kind", "dtype"}
value    {"kind", "value": null | true | false | integer | number}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.bundle.format import (
    DTYPE_NAMES,
    DTYPES,
    LARGEST,
    MAX_DIMS,
    BadBundle,
    count,
    counts,
    mapping,
    member,
    number,
    short,
    text,
)
from dsv4_bench.probes.bundle.storages import StorageTable
from dsv4_bench.probes.layout import storage_key, view_of

_LARGEST_INT = 2**31 - 1


class ExpertSubset:
    """An expert bank of which only some experts are here. Raises DSV4Error for any other."""

    def __init__(self, total: int, experts: dict[int, Expert]) -> None:
        self.total = total
        self.experts = experts

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, expert: int) -> Expert:
        if expert not in self.experts:
            raise DSV4Error(
                f"expert {expert} is not in the bundle", f"it holds {sorted(self.experts)}"
            )
        return self.experts[expert]


# ------------------------------------------------------------------------------ writing


def tensors_of(name: str, value: Any, used: Iterable[int] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an argument, named after it; of an expert bank those of `used`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Weight):
        yield f"{name}.data", value.data
        if value.scale is not None:
            yield f"{name}.scale", value.scale
    elif isinstance(value, Expert):
        for leaf, weight in zip(Expert._fields, value, strict=True):
            yield from tensors_of(f"{name}.{leaf}", weight)
    elif isinstance(value, Step):
        yield f"{name}.tokens", value.tokens
    elif is_bank(value):
        for expert in used:
            yield from tensors_of(f"{name}.{expert}", value[expert])


def is_bank(value: Any) -> bool:
    """Whether `value` is an expert bank: it has a length, and experts by number."""
    countable = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return countable and not isinstance(value, (Tensor, tuple, list, str, dict))


def encode(value: Any, table: StorageTable, used: Sequence[int] = ()) -> dict[str, Any]:
    """`value` as JSON; its tensors have been placed in `table`. Raises DSV4Error for other types."""
    if isinstance(value, Tensor):
        return _encode_tensor(value, table)
    if isinstance(value, Weight):
        return {
            "kind": "weight",
            "name": value.name,
            "format": value.format,
            "data": _encode_tensor(value.data, table),
            "scale": None if value.scale is None else _encode_tensor(value.scale, table),
            "global_scale": value.global_scale,
            "input_scale": value.input_scale,
        }
    if isinstance(value, Expert):
        leaves = zip(Expert._fields, value, strict=True)
        return {"kind": "expert", **{leaf: encode(weight, table) for leaf, weight in leaves}}
    if isinstance(value, Step):
        return {
            "kind": "step",
            "tokens": _encode_tensor(value.tokens, table),
            "starts": list(value.starts),
            "lengths": list(value.lengths),
            "window": value.window,
        }
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"kind": "dtype", "dtype": DTYPE_NAMES[value]}
    if value is None or isinstance(value, (bool, int, float)):
        return {"kind": "value", "value": value}
    if is_bank(value):
        experts = {str(expert): encode(value[expert], table) for expert in used}
        return {"kind": "experts", "count": len(value), "experts": experts}
    raise DSV4Error(f"a {type(value).__name__} cannot be put in a bundle", "arguments are tensors")


def _encode_tensor(tensor: Tensor, table: StorageTable) -> dict[str, Any]:
    if tensor.dtype not in DTYPE_NAMES:
        raise DSV4Error(f"a {tensor.dtype} tensor cannot be put in a bundle")
    return {
        "kind": "tensor",
        "file": table.file,
        "storage": table.names[storage_key(tensor)],
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": table.offset(tensor),
    }


# ------------------------------------------------------------------------------ reading


@dataclass
class Decoder:
    """JSON back to arguments. `storages(file)` gives the storages of a tensor file.

    `budget` bounds the bytes that all views of one call may claim: a view with stride 0 costs its
    author nothing and whoever works on it everything.
    """

    storages: Callable[[str], dict[str, Tensor]]
    budget: int
    claimed: int = field(default=0)

    def value(self, data: Any, where: str) -> Any:
        """Any argument. Raises BadBundle naming `where`."""
        fields = mapping(data, where)
        kind = member(fields, "kind", where)
        readers: dict[str, Callable[[dict[str, Any], str], Any]] = {
            "tensor": self.tensor,
            "weight": self.weight,
            "expert": self.expert,
            "experts": self.experts,
            "step": self.step,
            "dtype": _dtype,
            "value": _scalar,
        }
        if not isinstance(kind, str) or kind not in readers:
            raise BadBundle(f"{where} is of kind {short(kind)}", f"known: {', '.join(readers)}")
        return readers[kind](fields, where)

    def tensor(self, data: Any, where: str) -> Tensor:
        fields = mapping(data, where)
        dtype = _dtype(fields, where)
        shape = counts(member(fields, "shape", where), f"{where}.shape")
        stride = counts(member(fields, "stride", where), f"{where}.stride", len(shape))
        offset = count(member(fields, "offset", where), f"{where}.offset")
        elements = math.prod(max(length, 1) for length in shape)
        if len(shape) > MAX_DIMS or elements > LARGEST:
            raise BadBundle(f"{where} has shape {short(shape)}")
        empty = 0 in shape
        self.claimed += 0 if empty else elements * dtype.itemsize
        if self.claimed > self.budget:
            raise BadBundle(f"{where}: {self.claimed} bytes of tensors, at most {self.budget}")
        file = text(member(fields, "file", where), f"{where}.file")
        name = text(member(fields, "storage", where), f"{where}.storage")
        stored = self.storages(file)
        if name not in stored:
            raise BadBundle(f"{where}: {short(file)} has no storage {short(name)}")
        raw = stored[name]
        last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) + 1
        end = 0 if empty else (offset + last) * dtype.itemsize
        if end > raw.numel():
            raise BadBundle(f"{where} ends at byte {end} of a storage of {raw.numel()}")
        if dtype == torch.bool and bool((raw > 1).any()):
            raise BadBundle(f"{where}: a bool is 0 or 1")
        return view_of(raw, dtype, raw.storage_offset() // dtype.itemsize + offset, shape, stride)

    def weight(self, data: Any, where: str) -> Weight:
        fields = mapping(data, where)
        scale = member(fields, "scale", where)
        given = member(fields, "input_scale", where)
        weight = Weight(
            text(member(fields, "name", where), f"{where}.name"),
            text(member(fields, "format", where), f"{where}.format"),
            self.tensor(member(fields, "data", where), f"{where}.data"),
            None if scale is None else self.tensor(scale, f"{where}.scale"),
            number(member(fields, "global_scale", where), f"{where}.global_scale"),
            None if given is None else number(given, f"{where}.input_scale"),
        )
        _check_weight(weight, where)
        return weight

    def expert(self, data: Any, where: str) -> Expert:
        fields = mapping(data, where)
        leaves = [
            self.weight(member(fields, leaf, where), f"{where}.{leaf}") for leaf in Expert._fields
        ]
        (inner, d), down, up = leaves[0].shape, leaves[1].shape, leaves[2].shape
        if up != (inner, d) or down != (d, inner):
            raise BadBundle(f"{where}: w1 {(inner, d)}, w2 {down}, w3 {up} do not belong together")
        return Expert(*leaves)

    def experts(self, data: Any, where: str) -> ExpertSubset:
        fields = mapping(data, where)
        total = count(member(fields, "count", where), f"{where}.count", 65536)
        table = mapping(member(fields, "experts", where), f"{where}.experts")
        experts = {}
        for name, item in table.items():
            if not (name.isdecimal() and name.isascii() and len(name) < 6 and int(name) < total):
                raise BadBundle(f"{where}: {short(name)!r} is not one of {total} experts")
            experts[int(name)] = self.expert(item, f"{where}.{name}")
        return ExpertSubset(total, experts)

    def step(self, data: Any, where: str) -> Step:
        fields = mapping(data, where)
        tokens = self.tensor(member(fields, "tokens", where), f"{where}.tokens")
        lengths = counts(member(fields, "lengths", where), f"{where}.lengths", None, _LARGEST_INT)
        starts = member(fields, "starts", where)
        starts = counts(starts, f"{where}.starts", len(lengths), _LARGEST_INT)
        window = count(member(fields, "window", where), f"{where}.window", 1 << 20)
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or sum(lengths) != len(tokens):
            raise BadBundle(
                f"{where}: {tokens.dtype} tokens {list(tokens.shape)}, lengths sum to {sum(lengths)}"
            )
        if not lengths or not window or 0 in lengths:
            raise BadBundle(f"{where}: every sequence has tokens, and the window rows")
        return Step(tokens, tuple(starts), tuple(lengths), window)


def _dtype(fields: dict[str, Any], where: str) -> torch.dtype:
    name = member(fields, "dtype", where)
    if not isinstance(name, str) or name not in DTYPES:
        raise BadBundle(f"{where} has dtype {short(name)}", f"known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _scalar(fields: dict[str, Any], where: str) -> bool | int | float | None:
    value = member(fields, "value", where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return count(value, where)
    return number(value, where)


def _check_weight(weight: Weight, where: str) -> None:
    """Raise BadBundle unless data and scale have the dtypes and shapes of the format."""
    data, scale = weight.data, weight.scale
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]] = {
        "nvfp4": ((torch.uint8,), (torch.float8_e4m3fn,)),
        "mxfp4": ((torch.uint8,), (torch.float8_e8m0fnu,)),
        "fp8_block": ((torch.float8_e4m3fn,), (torch.float8_e8m0fnu, torch.float32)),
        "dense": ((torch.bfloat16, torch.float32, torch.float16), ()),
    }
    if weight.format not in expected:
        raise BadBundle(f"{where} has format {short(weight.format)}", f"known: {list(expected)}")
    values, scales = expected[weight.format]
    if data.dim() != 2 or data.dtype not in values:
        raise BadBundle(f"{where}: {weight.format} data is {data.dtype} {list(data.shape)}")
    if scale is None:
        if scales:
            raise BadBundle(f"{where}: {weight.format} needs a scale")
        return
    n, k = weight.shape
    blocks = {
        "nvfp4": (n, k // NVFP4_BLOCK, k % NVFP4_BLOCK),
        "mxfp4": (n, k // MXFP4_BLOCK, k % MXFP4_BLOCK),
        "fp8_block": (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK), 0),
    }
    rows, columns, rest = blocks.get(weight.format, (0, 0, 1))
    if scale.dtype not in scales or tuple(scale.shape) != (rows, columns) or rest:
        raise BadBundle(
            f"{where}: {weight.format} {list(weight.shape)} with scale {scale.dtype} "
            f"{list(scale.shape)}"
        )
