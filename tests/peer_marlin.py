"""Marlin (as SGLang ships it) as a peer of the NVFP4 products, dense and of the routed experts.

Weights are random and brought into its layout here. Of the experts only the two products are timed:
its users bring routing, activation and sum themselves, so the figure flatters it.
"""

from __future__ import annotations

from functools import cache

import torch
from peer_library import (
    BF16,
    CUDA,
    GLOBAL,
    Peer,
    aligned,
    codes,
    dequantised,
    error,
    launch,
    products_error,
)
from torch import Tensor

BLOCKS = (8, 16, 32, 48, 64)


@cache
def tile_order() -> Tensor:
    """Which of a tile's 16 x 64 codes (k-major) stands where: [128 words, 8 nibbles]."""
    thread, warp = torch.arange(32, device=CUDA)[:, None, None], torch.arange(4, device=CUDA)
    column, row = warp[None, :, None] * 16 + thread // 4, thread % 4 * 2
    value = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7], device=CUDA)  # nibble -> value
    offset = torch.tensor([0, 1, 8, 9], device=CUDA)[value % 4]
    return ((row + offset) * 64 + column + value // 4 * 8).view(128, 8)


def packed_layout(packed: Tensor) -> Tensor:
    """Codes uint8 [n, k / 2] as int32 [k / 16, 2 n]."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    values = torch.stack((packed & 15, packed >> 4), -1).view(n // 64, 64, k // 16, 16)
    tiles = values.permute(2, 0, 3, 1).reshape(k // 16, n // 64, 1024)
    words = tiles[..., tile_order()].int() << (4 * torch.arange(8, device=CUDA, dtype=torch.int32))
    return words.sum(-1, dtype=torch.int32).view(k // 16, 2 * n)


def scale_layout(scale: Tensor) -> Tensor:
    """e4m3 scales [n, k / 16] as bytes [k / 16, n]: exponent and mantissa of 128 times the value."""
    n, groups = scale.shape
    order = torch.arange(64, device=CUDA).view(8, 8).T.reshape(-1)
    rows = scale.half().T.reshape(-1, 64)[:, order].view(-1, 4)[:, [0, 2, 1, 3]]
    bits = (rows.reshape(groups, n) * 128).contiguous().view(torch.int16) << 1
    return bits.view(torch.uint8).view(groups, n, 2)[..., 1].contiguous()


def global_scale(experts: int) -> Tensor:
    return torch.full((experts,), GLOBAL, device=CUDA, dtype=BF16) * 2.0**119


def workspace() -> Tensor:
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    return torch.zeros(4 * processors, device=CUDA, dtype=torch.int32)


def dense(n: int, k: int, m: int, turn: int) -> Peer:
    """One product of bf16 rows [m, k] with a matrix of its own."""
    packed, scale = codes(turn, n, k)
    x, out = torch.randn(m, k, device=CUDA, dtype=BF16), torch.empty(m, n, device=CUDA, dtype=BF16)
    atomic = int(n < 2048 <= k)  # as SGLang chooses
    space = workspace()
    sums = torch.empty(len(space) // 4 * min(-(-m // 16) * 16, 64) * 256, device=CUDA)
    fixed = (x, packed_layout(packed), out, sums, scale_layout(scale), global_scale(1), space)
    call = launch("marlin", "marlin_dense", *fixed, m, n, k, atomic)
    return call, lambda: error(out, x.float() @ dequantised(turn, n, k).T, 0.02)


@cache
def bank(n: int, k: int, experts: int, which: int) -> tuple[Tensor, Tensor]:
    """The matrices of all experts, of seeds 2 e + which."""
    found = [codes(2 * e + which, n, k) for e in range(experts)]
    return (
        torch.stack([packed_layout(packed) for packed, _ in found]),
        torch.stack([scale_layout(scale) for _, scale in found]),
    )


def experts(hidden: int, inner: int, chosen: Tensor, count: int) -> Peer:
    """Both products of the routed experts; chosen [tokens, experts a token] int32."""
    m, slots = chosen.shape
    block = next((b for b in BLOCKS if m * slots / count / b < 0.9), BLOCKS[-1])
    pairs, owners, total = aligned(chosen, count, block)
    padded = torch.tensor([total, 0], device=CUDA, dtype=torch.int32)  # no inactive blocks before
    x = torch.randn(m, hidden, device=CUDA, dtype=BF16)
    middle = torch.randn(m * slots, inner, device=CUDA, dtype=BF16)
    routing = torch.rand(m * slots, device=CUDA)
    up = torch.empty(m * slots, 2 * inner, device=CUDA, dtype=BF16)
    down = torch.empty(m * slots, hidden, device=CUDA, dtype=BF16)
    plan, space, scale = (pairs, owners, padded, routing, block), workspace(), global_scale(count)

    def product(a: Tensor, out: Tensor, which: int, top: int, weighted: int, rows: int) -> object:
        n, k = out.shape[1], a.shape[1]
        weight, scales = bank(n, k, count, which)
        fixed = (a, weight, out, None, scales, scale, space)
        return launch("marlin", "marlin_experts", *fixed, *plan, top, weighted, rows, n, k)

    first, second = product(x, up, 0, slots, 0, m), product(middle, down, 1, 1, 1, m * slots)

    def call() -> None:
        first()
        second()

    return call, lambda: products_error(up, down, x, middle, chosen, routing)
