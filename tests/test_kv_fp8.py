"""The packed KV entry: against e4m3 and scales worked out by hand, in the ops, and in a whole model."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv4_bench.engine.cpu
import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.kv_entry import SCALE_BYTES, TILE, pack, packed_bytes, plain_of, unpack
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.registry import (
    IMPLEMENTATIONS,
    OPS,
    Implementation,
    parse_route,
    reference,
)

WIDTH, ROPE, PLAIN, PACKED = 512, 64, 448, 584


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


# ------------------------------------------------------------------------------ by hand


def e4m3(code: int) -> Fraction:
    """The value of a code below 0x7F, from its bits: sign, 4 of exponent (bias 7), 3 of mantissa."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) / 64
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


VALUES = [e4m3(code) for code in range(0x7F)]


def nearest(magnitude: Fraction) -> int:
    """The code nearest to `magnitude` <= 448, ties to the even one."""
    above = bisect_left(VALUES, magnitude)
    if above == 0 or VALUES[above] == magnitude:
        return above
    low, high = magnitude - VALUES[above - 1], VALUES[above] - magnitude
    return above - 1 if low < high or (low == high and above % 2) else above


def packed_tile(values: list[float]) -> tuple[list[int], int]:
    """Codes and scale byte of a tile, in exact arithmetic."""
    finite = [abs(Fraction(v)) for v in values if math.isfinite(v)]
    amax = max([*finite, Fraction(torch.tensor(1e-4).item())])
    byte = 1
    while Fraction(2) ** (byte - 127) * 448 < amax:
        byte += 1
    scale = Fraction(2) ** (byte - 127)
    codes = []
    for v in values:
        sign = 0x80 if math.copysign(1.0, v) < 0 else 0
        codes.append(nearest(abs(Fraction(v)) / scale) | sign if math.isfinite(v) else 0x7F)
    return codes, byte


def rows_of(kind: str) -> Tensor:
    rows = torch.randn(6, WIDTH)
    if kind == "spread":  # every tile with magnitudes over 40 powers of two
        return rows * torch.exp2(torch.randint(-20, 20, rows.shape))
    if kind == "ties":  # halfway between two e4m3, at scale 1
        rows = torch.tensor([float((VALUES[i] + VALUES[i + 1]) / 2) for i in range(0x7E)])
        rows = rows.repeat(25)[: 6 * WIDTH].view(6, WIDTH).clone()
        rows[:, ::TILE] = 448
        return rows * torch.where(torch.rand(6, WIDTH) < 0.5, -1, 1)
    if kind == "edges":  # amax at, just below and just above 448 times a power of two
        scales = torch.exp2(torch.randint(-24, 119, (6, 1)).float())
        rows = rows.clamp(-1, 1) * 300
        rows[:, ::TILE] = torch.tensor([448.0, 446.0, 450.0, -448.0, -450.0, 224.0])[:, None]
        return rows * scales
    if kind == "small":
        return rows * torch.tensor([0.0, 1e-30, 1e-7, 1e-4, 1e-5, -0.0])[:, None]
    rows[0, 3], rows[1, 70], rows[2, 447] = torch.nan, torch.inf, -torch.inf
    rows[3, 128:192], rows[4, 500], rows[5, 511] = torch.nan, torch.nan, torch.inf
    return rows


KINDS = ["spread", "ties", "edges", "small", "non-finite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packing_is_that_of_exact_arithmetic(kind: str, dtype: torch.dtype) -> None:
    rows = rows_of(kind).to(torch.bfloat16).to(dtype)
    entries = pack(rows, PACKED)
    assert (entries.dtype, entries.shape) == (torch.uint8, (6, PACKED))
    for row, entry in zip(rows, entries, strict=True):
        for tile in range(PLAIN // TILE):
            at = slice(tile * TILE, (tile + 1) * TILE)
            codes, byte = packed_tile(row[at].tolist())
            assert entry[at].tolist() == codes
            assert int(entry[PACKED - SCALE_BYTES + tile]) == byte
        assert int(entry[-1]) == 0
        rope = entry[PLAIN : PLAIN + 2 * ROPE].contiguous().view(torch.bfloat16)
        assert torch.equal(rope.nan_to_num(7.0), row[PLAIN:].to(torch.bfloat16).nan_to_num(7.0))


def test_float32_rows_round_once() -> None:
    """Halfway cases that a detour through bfloat16 would decide differently."""
    rows = torch.zeros(1, WIDTH)
    rows[0, 0], rows[0, 1], rows[0, 2] = 448, 17 + 2.0**-10, 19 - 2.0**-10  # between 16, 18 and 20
    assert unpack(pack(rows, PACKED), WIDTH)[0, :3].tolist() == [448, 18, 18]


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_is_that_of_exact_arithmetic(kind: str) -> None:
    entries = pack(rows_of(kind), PACKED)
    for entry, value in zip(entries, unpack(entries, WIDTH), strict=True):
        for i in range(PLAIN):
            code, byte = int(entry[i]), int(entry[PACKED - SCALE_BYTES + i // TILE])
            if code & 0x7F == 0x7F:
                assert value[i].isnan()
                continue
            magnitude = float(e4m3(code & 0x7F) * Fraction(2) ** (byte - 127))
            assert value[i].item() == (-magnitude if code & 0x80 else magnitude)
    values = unpack(entries, WIDTH)
    exact = values.to(torch.bfloat16).float()
    assert torch.equal(values.nan_to_num(7.0), exact.nan_to_num(7.0))


def test_error_is_within_the_documented_bound_and_representable_values_come_back() -> None:
    rows = rows_of("spread").double()
    entries = pack(rows, PACKED)
    back = unpack(entries, WIDTH).double()
    scales = torch.exp2(entries[:, PACKED - SCALE_BYTES : -1].double() - 127)
    bound = torch.maximum(rows[:, :PLAIN].abs() / 16, scales.repeat_interleave(TILE, 1) / 1024)
    assert ((back - rows)[:, :PLAIN].abs() <= bound).all()
    assert torch.equal(unpack(pack(back, PACKED), WIDTH).double(), back)


def test_a_nan_changes_no_other_value() -> None:
    rows = torch.randn(1, WIDTH)
    spoilt = rows.clone()
    spoilt[0, 100] = torch.inf
    keep = torch.arange(WIDTH) != 100
    a, b = (unpack(pack(x, PACKED), WIDTH)[0] for x in (rows, spoilt))
    assert b[100].isnan() and torch.equal(a[keep], b[keep])


def test_no_rows() -> None:
    nothing = torch.empty(0, WIDTH)
    assert pack(nothing, PACKED).shape == (0, PACKED)
    assert unpack(pack(nothing, PACKED), WIDTH).shape == (0, WIDTH)
    ring = pack(torch.randn(3, WIDTH), PACKED)
    assert torch.equal(reference("gather_swa")(ring, nothing), ring)


def test_widths() -> None:
    assert packed_bytes(WIDTH, ROPE) == PACKED and plain_of(WIDTH, PACKED) == PLAIN
    rows = torch.randn(3, 128)  # a tile and a half
    entries = pack(rows, packed_bytes(128, 32))
    assert entries.shape == (3, 96 + 64 + 8) and not entries[:, -6:].any()
    assert (unpack(entries, 128) - rows).abs().max() < 0.3
    for width, rope in ((512, 0), (512, 60), (640, 64), (64, 64), (100, 32)):
        with pytest.raises(DSV4Error, match="no packed KV entry"):
            packed_bytes(width, rope)
    for packed in (583, 585, 520, 512, 1032):
        with pytest.raises(DSV4Error, match="no packed KV entry"):
            plain_of(WIDTH, packed)


# ------------------------------------------------------------------------------ in the ops


def test_cache_write_packs_into_the_named_rows_only() -> None:
    cache = torch.full((9, PACKED), 0xAB, dtype=torch.uint8)
    rows = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    reference("cache_write")(rows, torch.tensor([7, -1, 0, 3]), cache)
    for row, slot in ((0, 7), (2, 0), (3, 3)):
        assert torch.equal(cache[slot], pack(rows[row : row + 1], PACKED)[0])
    assert (cache[[1, 2, 4, 5, 6, 8]] == 0xAB).all()
    cost = OPS["cache_write"].cost((rows, torch.tensor([7, -1, 0, 3]), cache), {}, None)
    assert cost.bytes == 4 * 8 + 3 * (2 * WIDTH + PACKED)


def test_gather_swa_packs_the_new_tokens() -> None:
    ring = pack(torch.randn(5, WIDTH), PACKED)
    kv = torch.randn(3, WIDTH)
    window = reference("gather_swa")(ring, kv)
    assert torch.equal(window, torch.cat((ring, pack(kv, PACKED))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_on_the_unpacked_pools(dtype: torch.dtype) -> None:
    q = torch.randn(3, 4, WIDTH).to(dtype)
    window, entries = pack(torch.randn(20, WIDTH), PACKED), pack(torch.randn(30, WIDTH), PACKED)
    index, entry_index = torch.randint(-1, 20, (3, 8)).int(), torch.randint(-1, 30, (3, 9)).int()
    for pool, used in ((window, index), (entries, entry_index)):  # unused rows: every value NaN
        unused = [row for row in range(len(pool)) if row not in used.flatten().tolist()]
        pool[unused] = 0xFF
    params = {"sink": torch.randn(4), "scale": WIDTH**-0.5}
    attention = reference("attention")
    o, lse = attention(q, window, index, entries, entry_index, **params)
    plain = [unpack(pool, WIDTH).to(dtype) for pool in (window, entries)]
    want = attention(q, plain[0], index, plain[1], entry_index, **params)
    assert torch.equal(o, want[0]) and torch.equal(lse, want[1])
    assert o.isfinite().all()
    with double_precision():
        wide = attention(q.double(), window, index, entries, entry_index, **params)
        truth = attention(
            q.double(), plain[0].double(), index, plain[1].double(), entry_index, **params
        )
    assert torch.equal(wide[0], truth[0]) and wide[0].dtype == torch.float64
    nothing, _ = attention(q, window[:0], index * 0 - 1, None, None, **params)
    assert not nothing.any()


# ------------------------------------------------------------------------------ in a model


def rounded(rows: Tensor, packed: int) -> Tensor:
    """What is left of rows that were packed, in their own dtype."""
    return unpack(pack(rows, packed), rows.shape[1]).to(rows.dtype)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A checkpoint, and implementations `rounded` that round what an unpacked cache is given."""
    checkpoint = Checkpoint(make_checkpoint())
    config = checkpoint.config
    packed = packed_bytes(config.head_dim, config.qk_rope_head_dim)

    def write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
        reference("cache_write")(rounded(rows, packed), slots, cache)

    def gather(ring: Tensor, kv: Tensor) -> Tensor:
        return reference("gather_swa")(ring, rounded(kv, packed))

    for op, function in (("cache_write", write), ("gather_swa", gather)):
        monkeypatch.setitem(IMPLEMENTATIONS[op], "rounded", Implementation(op, "rounded", function))
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_cache_is_a_cache_of_rounded_rows(
    rounding: Checkpoint, dtype: torch.dtype
) -> None:
    ids = [(11 * i + 5) % rounding.config.vocab_size for i in range(146)]
    packed = Transformer(rounding, dtype, kv="fp8")
    plain = Transformer(rounding, dtype)
    sites = ("*/window_write", "*/gather_swa", "*/attn/compressor/write")
    plain.set_route(parse_route([f"{site}=rounded" for site in sites]))
    for chunks in ((131, 1, 1, 13), (141, 1)):
        got, want = (teacher_forced_logits(model, ids, chunks) for model in (packed, plain))
        assert torch.equal(got, want), chunks
    assert not torch.equal(got, teacher_forced_logits(Transformer(rounding, dtype), ids, chunks))


def test_kernels_that_take_no_packed_entries_say_so(make_checkpoint: Callable[..., Path]) -> None:
    model = Transformer(Checkpoint(make_checkpoint()), kv="fp8")
    model.set_route(parse_route(["kernel"]))
    if model.sites["embed"].stamp.note:
        pytest.skip(model.sites["embed"].stamp.note)
    left = {site.op for site in model.sites.values() if site.stamp.implementation != "cpu"}
    assert left == {"attention", "cache_write", "gather_swa"}
    assert model.sites["L1/attn/core"].stamp.note == "cpu: takes no packed KV entries"
    assert teacher_forced_logits(model, list(range(2, 140)), (100, 1)).isfinite().all()


def test_cache_shapes_growth_and_snapshots(make_checkpoint: Callable[..., Path]) -> None:
    model = Transformer(Checkpoint(make_checkpoint()), torch.bfloat16, kv="fp8")
    cache = model.new_cache(batch=2)
    bytes_of = packed_bytes(model.config.head_dim, model.config.qk_rope_head_dim)
    for layer in cache.layers:
        assert layer.ring.dtype == torch.uint8 and layer.ring.shape[1] == bytes_of
        if layer.index_entries is not None:
            assert layer.index_entries.dtype == torch.bfloat16
    first = model.forward(cache.step([[5, 6, 7], list(range(100))]), cache)
    saved = cache.snapshot()
    again = [model.forward(cache.step([[9], [8]]), cache)]
    cache.restore(saved)
    again.append(model.forward(cache.step([[9], [8]]), cache))
    assert first.isfinite().all() and torch.equal(*again)
    with pytest.raises(DSV4Error, match="unknown KV format 'fp9'"):
        Transformer(model.checkpoint, kv="fp9").new_cache()


def test_heads_that_cannot_be_packed(make_checkpoint: Callable[..., Path]) -> None:
    config = replace(Checkpoint(make_checkpoint()).config, qk_rope_head_dim=36)
    with pytest.raises(DSV4Error, match="no packed KV entry for 92 dimensions and 36 roped"):
        Cache(config, kv="fp8")
