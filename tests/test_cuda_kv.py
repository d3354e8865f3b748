"""The CUDA kernels on packed KV entries: bit for bit the reference's packing, attention as on bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_judge import judge, kernel, reference, same_each_time
from test_cuda_attention import WIDTHS, case
from test_kv_fp8 import KINDS, PACKED, WIDTH, rows_of
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import resolve_checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.kv_entry import pack, packed_bytes, unpack
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def packed_case(
    n: int, heads: int, window: int, selected: int, dim: int = 512, **options: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """`case` with packed pools, the same with those pools unpacked, and the constants.

    Rows that no index names are NaN in both: every byte of their packed form is 0xFF.
    """
    args, params = case(n, heads, window, selected, dim, **options)
    packed, plain = list(args), list(args)
    for at in (1, 3):
        unused = args[at].isnan().all(1)
        entries = pack(args[at], packed_bytes(dim, dim // 8))
        plain[at] = unpack(entries, dim).to(args[0].dtype)
        entries[unused], plain[at][unused] = 0xFF, torch.nan
        packed[at] = entries
    return tuple(packed), tuple(plain), params


def same_as_unpacked(packed: tuple[Any, ...], plain: tuple[Any, ...], params: Any) -> None:
    """The same bits: packed values are exact in bfloat16, and products and sums come in one order."""
    got, want = kernel("attention", *packed, **params), kernel("attention", *plain, **params)
    for name, value in got.items():
        assert torch.equal(value, want[name]), f"{name}: {(value != want[name]).sum()} differ"


# ------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("n", [1, 3, 9, 70, 150])
@pytest.mark.parametrize("window, selected", WIDTHS)
def test_widths(n: int, window: int, selected: int) -> None:
    packed, plain, params = packed_case(n, 64, window, selected)
    if n < 10:  # what the kernel makes of unpacked pools is judged in test_cuda_attention.py
        judge("attention", *packed, **params)
    same_as_unpacked(packed, plain, params)


@pytest.mark.parametrize("heads", [128, 65, 16, 1])
def test_heads(heads: int) -> None:
    for n in (1, 40):
        packed, plain, params = packed_case(n, heads, 128, 300)
        same_as_unpacked(packed, plain, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [512, 128, 64])
def test_any_width_and_dtype(dim: int, dtype: torch.dtype) -> None:
    packed, plain, params = packed_case(5, 7, 64, 33, dim, dtype=dtype)
    judge("attention", *packed, **params)
    same_as_unpacked(packed, plain, params)


@pytest.mark.parametrize("n", [1, 200])
def test_empty_keys(n: int) -> None:
    packed, _, params = packed_case(n, 64, 128, 512, empty=1.0)  # nothing but the sink
    assert not judge("attention", *packed, **params)["o"].any()
    packed, plain, params = packed_case(n, 64, 128, 512, empty=0.97)  # whole blocks are empty
    judge("attention", *packed, **params)
    same_as_unpacked(packed, plain, params)
    q, window, index, entries, entry_index = packed
    judge("attention", q, window, index, None, None, **params)
    judge("attention", q, window, index, entries, entry_index[:, :0], **params)


def test_scales_far_apart() -> None:
    """Tiles and rows whose magnitudes differ by powers of two."""
    packed, plain, params = packed_case(9, 64, 128, 512)
    for at in (1, 3):
        scaled = plain[at].float() * torch.exp2(
            torch.randint(-12, 3, plain[at].shape, device="cuda")
        )
        scaled *= torch.exp2(torch.randint(-6, 4, (len(scaled), 1), device="cuda"))
        packed[at].copy_(pack(scaled, PACKED))
        packed[at][plain[at].isnan().all(1)] = 0xFF
    judge("attention", *packed, **params)


def test_a_nan_code_reaches_only_the_tokens_that_name_its_row() -> None:
    packed, _, params = packed_case(9, 64, 128, 512)
    clean = kernel("attention", *packed, **params)
    row = int(packed[4][4][packed[4][4] >= 0][0])
    names = (packed[4] == row).any(1)
    packed[3][row, 77] = 0x7F
    spoilt = judge("attention", *packed, **params)
    assert spoilt["o"][names].isnan().any(-1).all()
    assert torch.equal(spoilt["o"][~names], clean["o"][~names])


def test_strided_and_offset_pools() -> None:
    packed, _, params = packed_case(6, 64, 128, 512)
    want = kernel("attention", *packed, **params)
    wide = torch.full((len(packed[1]), 600), 0xFF, dtype=torch.uint8, device="cuda")
    wide[:, 5 : 5 + PACKED] = packed[1]
    offset = torch.full((packed[3].numel() + 8,), 0xFF, dtype=torch.uint8, device="cuda")
    offset[8:] = packed[3].flatten()
    pools = wide[:, 5 : 5 + PACKED], offset[8:].view(packed[3].shape)
    got = kernel("attention", packed[0], pools[0], packed[2], pools[1], packed[4], **params)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("n", [1, 8, 64, 256])
def test_repeats_are_identical(n: int) -> None:
    packed, _, params = packed_case(n, 64, 128, 512)
    same_each_time("attention", *packed, **params)


def test_prefill() -> None:
    packed, plain, params = packed_case(1000, 64, 128, 512)
    same_as_unpacked(packed, plain, params)


def test_what_the_kernel_does_not_take() -> None:
    packed, plain, params = packed_case(2, 64, 64, 64)
    for pools in ((packed[1], plain[3]), (packed[1][:, :-4], packed[3][:, :-4])):
        with pytest.raises(DSV4Error):
            kernel("attention", packed[0], pools[0], packed[2], pools[1], packed[4], **params)


# ------------------------------------------------------------------------------ packing


def same_entries(got: Tensor, want: Tensor, plain: int = 448) -> None:
    """Bit for bit, but that a NaN among the roped values may be any NaN."""
    rope = [x[:, plain:-8].contiguous().view(torch.bfloat16) for x in (got, want)]
    nan = rope[1].isnan()
    assert torch.equal(rope[0].isnan(), nan)
    keep = torch.ones_like(got, dtype=torch.bool)
    keep[:, plain:-8] = ~nan.repeat_interleave(2, 1)
    assert torch.equal(got[keep], want[keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_write_packs_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    rows = rows_of(kind).repeat(50, 1).to(dtype)
    slots = torch.randperm(400)[:300]
    slots[::7] = -1
    cache = torch.randint(0, 256, (400, PACKED), dtype=torch.uint8)
    want = reference("cache_write", rows, slots, cache.clone())["cache"]
    got = kernel("cache_write", rows.cuda(), slots.cuda(), cache.cuda())["cache"].cpu()
    same_entries(got, want)
    written = slots[slots >= 0]
    untouched = torch.ones(400, dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(got[untouched], cache[untouched])


@pytest.mark.parametrize("offset, stride", [(8, 600), (3, 584), (0, 587)])
def test_cache_write_into_views(offset: int, stride: int) -> None:
    rows, slots = torch.randn(20, WIDTH, device="cuda"), torch.randperm(30, device="cuda")[:20]
    storage = torch.full((offset + 30 * stride,), 0xAB, dtype=torch.uint8, device="cuda")
    cache = storage[offset:].view(30, stride)[:, :PACKED]
    kernel("cache_write", rows, slots, cache)
    assert torch.equal(cache[slots], pack(rows, PACKED))
    storage[offset:].view(30, stride)[slots, :PACKED] = 0xAB
    assert (storage == 0xAB).all()


@pytest.mark.parametrize("width, rope", [(512, 64), (128, 32), (128, 16), (40, 8), (16, 8)])
def test_other_widths(width: int, rope: int) -> None:
    packed = packed_bytes(width, rope)
    rows, slots = torch.randn(9, width, device="cuda") * 30, torch.arange(9, device="cuda")
    cache = torch.full((9, packed), 0xAB, dtype=torch.uint8, device="cuda")
    assert torch.equal(kernel("cache_write", rows, slots, cache)["cache"], pack(rows, packed))


@pytest.mark.parametrize("r, n", [(128, 1), (256, 1000), (0, 5), (7, 0)])
def test_gather_swa_packs_as_the_reference(r: int, n: int) -> None:
    ring = torch.randint(0, 256, (r, PACKED), dtype=torch.uint8, device="cuda")
    kv = torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16)
    want = reference("gather_swa", ring, kv)["window"]
    assert torch.equal(kernel("gather_swa", ring, kv)["window"], want)


# ------------------------------------------------------------------------------ a model


def test_the_demo_with_packed_kv() -> None:
    """Kernels, and the reference in bfloat16 on the CPU: as far from float32 there, all with packed KV."""
    checkpoint = Checkpoint(resolve_checkpoint(None))
    ids = [(7 * i + 3) % checkpoint.config.vocab_size for i in range(300)]
    chunks = (200, 1, 1, 98)
    truth = teacher_forced_logits(Transformer(checkpoint, torch.float32, "cpu", "fp8"), ids, chunks)
    errors = {}
    for route, device in (("reference", "cpu"), ("kernel", "cuda")):
        model = Transformer(checkpoint, torch.bfloat16, device, "fp8")
        model.set_route(parse_route([route]))
        logits = teacher_forced_logits(model, ids, chunks)
        errors[route] = float((logits - truth).norm() / truth.norm())
        if route == "kernel":
            kinds = {s.op: s.stamp.implementation for s in model.sites.values()}
            assert {kinds[op] for op in ("attention", "cache_write", "gather_swa")} == {"sm90"}
    print(errors)
    assert errors["kernel"] <= 2 * errors["reference"]
