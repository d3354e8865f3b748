"""Judging `sm90` kernels: against float64, by limits that the honest reference sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verified import measured

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS
from dsv4_bench.probes.limits import MARGIN
from dsv4_bench.probes.metrics import masks_differ, tensor_and_row_error

# Below this an error is not told from another order of additions. Tensor cores cut a sum's low bits.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-4}


def kernel(op: str, *args: Any, **params: Any) -> dict[str, Tensor]:
    """Outputs of the kernel by name, with the arguments that it writes in place."""
    spec = OPS[op]
    result = spec.name_outputs(IMPLEMENTATIONS[op]["sm90"].function(*args, **params))
    bound = spec.bind(args, params)
    return {**result, **{name: bound[name] for name in spec.mutates}}


def reference(op: str, *args: Any, **params: Any) -> dict[str, Tensor]:
    """The same of the reference."""
    spec = OPS[op]
    result = spec.name_outputs(spec.reference(*args, **params))
    bound = spec.bind(args, params)
    return {**result, **{name: bound[name] for name in spec.mutates}}


def copied(op: str, args: tuple[Any, ...]) -> list[Any]:
    """`args` with copies of what the op writes in place, of the same strides."""
    spec = OPS[op]
    names = dict(zip(spec.parameters, args, strict=False))
    return [
        torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        ).copy_(value)
        if name in spec.mutates
        else value
        for name, value in names.items()
    ]


def widened(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def judge(op: str, *args: Any, **params: Any) -> dict[str, Tensor]:
    """Run kernel, reference and float64 oracle on the same inputs; the kernel's outputs.

    Each output must have the reference's shape and dtype and the oracle's NaN and infinities, and
    an error of at most twice the reference's, of the whole and of the worst row.
    """
    got = kernel(op, *copied(op, args), **params)
    honest = reference(op, *copied(op, args), **params)
    with double_precision():
        wide = [widened(value) for value in copied(op, args)]
        truth = reference(op, *wide, **{name: widened(value) for name, value in params.items()})
    assert got.keys() == honest.keys() == truth.keys()
    for name, value in got.items():
        what = f"{op}.{name}"
        assert (value.shape, value.dtype) == (honest[name].shape, honest[name].dtype), what
        if name in OPS[op].discrete:
            equal = torch.equal(value, honest[name])
            measured(op, "sm90", float(not equal), 0.0)
            assert equal, what
            continue
        assert not masks_differ(value, truth[name]).any(), f"{what}: NaN or infinities differ"
        error, row = tensor_and_row_error(value, truth[name])
        fair, fair_row = tensor_and_row_error(honest[name], truth[name])
        floor = FLOOR[value.dtype]
        shape = list(value.shape)
        print(f"{what} {shape}: {error:.2e} (row {row:.2e}), honest {fair:.2e} ({fair_row:.2e})")
        measured(op, "sm90", error, MARGIN * fair + floor)
        assert error <= MARGIN * fair + floor, f"{what}: {error:.2e}, honest {fair:.2e}"
        assert row <= MARGIN * fair_row + 4 * floor, f"{what} row: {row:.2e}, {fair_row:.2e}"
    return got


def same_each_time(op: str, *args: Any, repeats: int = 100, **params: Any) -> None:
    """The kernel gives the same bits `repeats` times, into fresh memory."""
    first = kernel(op, *copied(op, args), **params)
    for _ in range(repeats):
        for name, value in kernel(op, *copied(op, args), **params).items():
            same = torch.equal(value.view(torch.uint8), first[name].view(torch.uint8))
            assert same, f"{op}.{name} differs between runs"


def views(x: Tensor) -> list[Tensor]:
    """The same values where rows are strided, where columns are, and where storage is offset."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), torch.nan)
    wide[..., 3:-2] = x
    sparse = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    sparse[..., ::2] = x
    offset = x.new_full((x.numel() + 1,), torch.nan)
    offset[1:] = x.flatten()
    return [wide[..., 3:-2], sparse[..., ::2], offset[1:].view(x.shape)]
