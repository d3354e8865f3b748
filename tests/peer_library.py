"""Peers that are shared objects: where they lie, how they are launched, how their results are judged.

DSV4_PEERS names a folder with <name>.so, each with plain C entries that take device pointers, numbers
and a CUDA stream, and return 0 or an error (docs/peers.md). Nothing of them is part of this project.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Peer = tuple[Callable[[], Any], Callable[[], float]]  # the call to time, and its error once called
BF16, CUDA = torch.bfloat16, torch.device("cuda")


def missing(name: str) -> str | None:
    """Why the peer library `name` cannot be used, or None."""
    folder = os.environ.get("DSV4_PEERS")
    if not folder:
        return "DSV4_PEERS is not set"
    path = Path(folder) / f"{name}.so"
    return None if path.is_file() else f"no {path}"


@cache
def library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["DSV4_PEERS"]) / f"{name}.so"))


def launch(name: str, entry: str, *arguments: Any) -> Callable[[], None]:
    """A call of `entry` on torch's current stream: tensors go as pointers, None as null."""

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, float):
            return ctypes.c_float(value)
        return ctypes.c_void_p(None) if value is None else value  # int, or a ctypes number

    function, passed = getattr(library(name), entry), [converted(a) for a in arguments]

    def call(keep: tuple[Any, ...] = arguments) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = function(*passed, stream)
        if status:
            raise RuntimeError(f"{entry} returned {status}")

    return call


def error(got: Tensor, want: Tensor, limit: float) -> float:
    """|got - want| / |want| in Frobenius norms. Raises ArithmeticError beyond `limit` (NaN too)."""
    found = float((got.float() - want.float()).norm() / want.float().norm())
    if not found <= limit:
        raise ArithmeticError(f"wrong result: relative error {found:.2e}, limit {limit:.0e}")
    return found


# ------------------------------------------------------------------------------ NVFP4 matrices

GLOBAL = 2.0**-7  # the scale of a whole matrix
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def codes(seed: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random e2m1 codes uint8 [n, k / 2], low nibble first, and e4m3 scales [n, k / 16] around 1."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    size: dict[str, Any] = {"dtype": torch.uint8, "device": CUDA, "generator": generator}
    packed = torch.randint(0, 256, (n, k // 2), **size)
    scale = torch.randint(0x20, 0x50, (n, k // 16), **size)
    return packed, scale.view(torch.float8_e4m3fn)


def dequantised(seed: int, n: int, k: int) -> Tensor:
    """The matrix of `codes`, float32 [n, k]."""
    packed, scale = codes(seed, n, k)
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=CUDA)
    values = table[torch.stack((packed & 15, packed >> 4), -1).long()].view(n, k // 16, 16)
    return (values * scale.float()[..., None] * GLOBAL).view(n, k)


def aligned(chosen: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, int]:
    """Pairs (token, slot) by expert, each expert's padded to a multiple of `block`.

    chosen [tokens, slots]. Returns pair numbers, `chosen.numel()` where padded; the expert of every
    block; how many pair numbers there are.
    """
    flat = chosen.flatten().long()
    counts = torch.bincount(flat, minlength=experts)
    blocks = (counts + block - 1) // block
    total = int(blocks.sum()) * block
    order = flat.argsort(stable=True)
    begins, starts = (blocks * block).cumsum(0) - blocks * block, counts.cumsum(0) - counts
    place = begins[flat[order]] + torch.arange(len(flat), device=CUDA) - starts[flat[order]]
    pairs = torch.full((total,), len(flat), device=CUDA, dtype=torch.int32)
    pairs[place] = order.int()
    owners = torch.arange(experts, device=CUDA).repeat_interleave(blocks).int()
    return pairs, owners, total


def products_error(
    up: Tensor, down: Tensor, x: Tensor, middle: Tensor, chosen: Tensor, weights: Tensor
) -> float:
    """The worse error of some rows of both products of the routed experts, seeds 2 e and 2 e + 1.

    up [pairs, 2 inner] of x [tokens, hidden], down [pairs, hidden] of middle [pairs, inner] times
    weights [pairs].
    """
    flat, slots, worst = chosen.flatten().tolist(), chosen.shape[1], 0.0
    for pair in {0, len(flat) // 2, len(flat) - 1}:
        seed = 2 * flat[pair]
        first = dequantised(seed, up.shape[1], x.shape[1]) @ x[pair // slots].float()
        second = dequantised(seed + 1, down.shape[1], middle.shape[1]) @ middle[pair].float()
        worst = max(worst, error(up[pair], first, 0.02))
        worst = max(worst, error(down[pair], second * weights[pair], 0.02))
    return worst
