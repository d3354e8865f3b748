"""NaN wherever an op may not read: recycled memory, unused rows, gaps and guard zones around arguments

A kernel that reads what it should not, or leaves part of its output unwritten, is often right by
luck: the memory held zeros, or the right answer of the run before. Run on poisoned memory, its
output bits change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.layout import storage_key, view_of

GUARD = 4096  # bytes before and after every argument
_BYTE = 0xFF  # NaN in every float format here, -1 in every integer one
_EMPTY = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
)


class PoisonedMemory(TorchFunctionMode):
    """Inside, memory that torch hands out uninitialised holds NaN (integers: -1)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY and result.dtype != torch.bool:
            _raw(result).fill_(_BYTE)
        return result


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@dataclass
class Guarded:
    """Arguments in memory of their own, with NaN in guard zones, in gaps and where `unused` says."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # memory, and before

    def touched(self, writable: tuple[str, ...]) -> list[str]:
        """Arguments in whose memory the op wrote where it may not."""
        found = []
        for name, (memory, before) in self.raw.items():
            expected = before
            if name in writable:  # its elements may change, what lies around them may not
                tensor = self.tensors[name]
                expected = before.clone()
                offset = int(tensor.storage_offset())
                same = view_of(expected, tensor.dtype, offset, tensor.shape, tensor.stride())
                same.copy_(tensor)
            if not torch.equal(memory, expected):
                found.append(name)
        return found


def guard(tensors: dict[str, Tensor]) -> Guarded:
    """Copies of `tensors` with guards, strides kept. Those that share memory share it still, and
    are left as they are."""
    shared = [storage_key(t) for t in tensors.values()]
    guarded = Guarded()
    for name, tensor in tensors.items():
        overlapping = any(
            n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if tensor.numel() == 0 or overlapping or shared.count(storage_key(tensor)) > 1:
            guarded.tensors[name] = tensor
            continue
        size = tensor.element_size()
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        length = sum((n - 1) * stride for n, stride in dims) + 1
        memory = torch.full(
            (2 * GUARD + length * size,), _BYTE, dtype=torch.uint8, device=tensor.device
        )
        copy = view_of(memory, tensor.dtype, GUARD // size, tensor.shape, tensor.stride())
        copy.copy_(tensor)
        guarded.tensors[name] = copy
        guarded.raw[name] = (memory, memory.clone())
    return guarded


# ------------------------------------------------------------------------------ unused rows


def _unread(rows: int, *used: Tensor | None) -> Tensor:
    """[rows] bool: rows that no index (int, -1 for none) names."""
    unread = torch.ones(rows, dtype=torch.bool)
    for index in used:
        if index is not None:
            unread[index[index >= 0].long().cpu()] = False
    return unread


def _attention_rows(inputs: dict[str, Any]) -> dict[str, Tensor]:
    found = {"window": _unread(len(inputs["window"]), inputs["window_index"])}
    if inputs["entries"] is not None:
        found["entries"] = _unread(len(inputs["entries"]), inputs["entry_index"])
    return found


def _score_rows(inputs: dict[str, Any]) -> dict[str, Tensor]:
    keys, step = inputs["keys"], inputs["step"]
    counts = torch.tensor([step.entries_of(b, inputs["ratio"]) for b in range(len(keys))])
    return {"keys": torch.arange(keys.shape[1]) >= counts[:, None]}


def _write_rows(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {"rows": (inputs["slots"] < 0).cpu()}


# By op: masks over the leading axes of the arguments, of what the op has no business reading.
UNUSED: dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]] = {
    "attention": _attention_rows,
    "index_score": _score_rows,
    "cache_write": _write_rows,
}


# ------------------------------------------------------------------------------ one run


@dataclass
class PoisonedRun:
    """Outputs of an op on poisoned memory, and the arguments it wrote to without permission."""

    outputs: dict[str, Tensor]
    touched: list[str]


def poisoned_run(
    call: Captured, function: Callable[..., Any], *, memory: bool = True, rows: bool = True
) -> PoisonedRun:
    """Run `function` on the call's inputs with guards around them and, if asked, poison in recycled
    `memory` and in unused `rows`. The outputs of a sound implementation do not change by a bit."""
    inputs = call.inputs
    guarded = guard(
        {n: v for n, v in inputs.items() if isinstance(v, Tensor) and n not in call.site.params}
    )
    if rows and call.site.op in UNUSED:
        for name, mask in UNUSED[call.site.op](inputs).items():
            if name in guarded.raw:
                guarded.tensors[name][mask.to(guarded.tensors[name].device)] = torch.nan
                raw, _ = guarded.raw[name]
                guarded.raw[name] = (raw, raw.clone())
    for name in call.site.spec.mutates:
        if name not in guarded.raw:
            guarded.tensors[name] = guarded.tensors[name].clone()
    arguments = {**inputs, **guarded.tensors}
    if memory:
        with PoisonedMemory():
            outputs = call.call(function, arguments)
    else:
        outputs = call.call(function, arguments)
    return PoisonedRun(outputs, guarded.touched(call.site.spec.mutates))
