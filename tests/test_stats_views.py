"""What the fused statistics kernel is told to read, the ring's rows, and whose memory is whose; no GPU needed."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import pytest
import torch
from test_observation import OnDevice
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.engine.registry import Site, spec_of
from dsv4_bench.probes.base import Probe, make_probes
from dsv4_bench.probes.graph_watch import _Place, bits_of
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call
from dsv4_bench.probes.stats import Stats, Sums, exponent_counts, reduced, tensor_stats

# struct dsv4_probe_item of csrc/cuda/probes_sm90.cu, written down once more
ITEM = struct.Struct("<QQqqqqiiiiiiii")
FIELDS = [
    "data",
    "index",
    "rows",
    "cols",
    "last",
    "stride",
    "dtype",
    "kind",
    "slot",
    "per_chunk",
    "first",
    "sums",
    "terms",
    "unused",
]


def items(views: list[cuda.stats.View], first_slot: int = 0) -> list[dict[str, int]]:
    buffer = cuda.stats.packed(views, first_slot)
    assert len(buffer) == ITEM.size * len(views)
    return [dict(zip(FIELDS, row, strict=True)) for row in ITEM.iter_unpack(buffer)]


def element(address: int) -> float:
    return ctypes.c_float.from_address(address).value


def read(item: dict[str, int], chunks: int) -> list[float]:
    """The float32 elements that the kernel reads, as its blocks come to them."""
    found = []
    for chunk in range(chunks):
        first = chunk * item["per_chunk"]
        for row in range(first, min(first + item["per_chunk"], item["rows"])):
            place = row
            if item["index"]:
                place = ctypes.c_int64.from_address(item["index"] + 8 * row).value
            if place < 0:
                continue
            length = item["last"] if row == item["rows"] - 1 else item["cols"]
            start = item["data"] + 4 * place * item["stride"]
            found += [element(start + 4 * column) for column in range(length)]
    return found


def assert_read(tensor: Tensor, expected: Tensor, index: Tensor | None = None) -> cuda.stats.View:
    view = cuda.stats.moments_view(tensor, index)
    assert view is not None
    (item,) = items([view])
    assert read(item, view.chunks) == expected.flatten().tolist()
    return view


BASE = torch.arange(40 * 100.0).view(40, 100)
DEEP = torch.arange(6 * 5 * 40.0).view(6, 5, 40)
IN_PLACE = {
    "whole": BASE,
    "rows": BASE[3:20],
    "every other row": BASE[::2],
    "columns": BASE[:, 10:61],
    "one row": BASE[5],
    "offset": BASE.flatten()[1:],
    "a stream": DEEP[:, 2],
    "rows of planes": DEEP[:, :3],
    "expanded": BASE[0].expand(9, 100),
    "scalar": BASE[3, 4],
    "none": BASE[:0],
    "no columns": BASE[:, :0],
    "a row of one": DEEP[:1, 2:3, 5:30],
}
COPIED = {"every other column": BASE[:, ::2], "transposed": BASE.T, "swapped": DEEP.transpose(0, 1)}


@pytest.mark.parametrize("name", IN_PLACE)
def test_views_are_read_where_they_lie(name: str) -> None:
    tensor = IN_PLACE[name]
    assert assert_read(tensor, tensor).tensor.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("name", COPIED)
def test_others_are_read_from_a_copy_that_is_kept(name: str) -> None:
    view = assert_read(COPIED[name], COPIED[name])
    assert view.tensor.is_contiguous() and view.tensor.data_ptr() != COPIED[name].data_ptr()


@pytest.mark.parametrize("count", [1, 2047, 2048, 2049, 100_000, (1 << 25) + 1])
def test_chunks_cover_every_element_once(count: int) -> None:
    view = cuda.stats.moments_view(torch.empty(count))
    assert view is not None and view.chunks <= 1024
    assert (view.rows - 1) * view.cols + view.last == count and 0 < view.last <= view.cols


def test_rows_that_an_index_names() -> None:
    for rows in ([4], [-1, 3, -1, 3, 39], [], list(range(39, -1, -1))):
        index = torch.tensor(rows, dtype=torch.int64)
        wanted = BASE[[row for row in rows if row >= 0]]
        assert_read(BASE, wanted, index)
        assert_read(BASE[:, 20:90], wanted[:, 20:90], index)
        assert_read(BASE, wanted, index.int())
        truth, by_torch = tensor_stats(wanted), Stats.of_row(reduced(BASE, index).tolist())
        assert by_torch == pytest.approx(truth)
        assert torch.equal(exponent_counts(BASE, index), exponent_counts(wanted))


def test_slots_and_chunks_of_many_views() -> None:
    views = [cuda.stats.moments_view(torch.empty(size)) for size in (5, 70_000, 0, 40_000)]
    table = items([view for view in views if view is not None], first_slot=7)
    assert [item["slot"] for item in table] == [7, 8, 9, 10]
    assert [item["first"] for item in table] == [0, 1, 36, 37]


def test_dtypes() -> None:
    kinds = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dsv4_dtype
    for dtype, code in kinds.items():
        view = cuda.stats.moments_view(torch.zeros(3, dtype=dtype))
        assert view is not None and items([view])[0]["dtype"] == code
    assert cuda.stats.moments_view(torch.zeros(3, dtype=torch.float64)) is None
    assert cuda.stats.moments_view(torch.zeros(3, dtype=torch.int32)) is None
    for dtype in (torch.int32, torch.int64):
        view = cuda.stats.values_view(torch.zeros(2, 3, dtype=dtype), 11)
        assert view is not None and view.chunks == 1
        item = items([view])[0]
        assert (item["kind"], item["rows"], item["last"]) == (2, 6, 11)
        assert item["dtype"] == dtype.itemsize


def test_rows_to_count_in() -> None:
    for tensor in (
        DEEP,
        DEEP[:, ::2],
        BASE.T,
        torch.zeros(2, 0, 5),
        torch.zeros(7, dtype=torch.int64),
    ):
        view = cuda.stats.empty_view(tensor, 5)
        assert view is not None
        item = items([view])[0]
        rows = math.prod(tensor.shape[:-1])
        assert (item["kind"], item["rows"], item["cols"], item["last"]) == (
            3,
            rows,
            tensor.shape[-1],
            5,
        )
        assert item["dtype"] == (8 if tensor.dtype == torch.int64 else 0)
        if tensor.is_floating_point():
            place = item["data"] + 4 * item["stride"] * (rows - 1)
            assert rows == 0 or element(place) == tensor.reshape(-1, tensor.shape[-1])[-1, 0]
    large = cuda.stats.empty_view(torch.zeros(1000, 512), 0)
    assert large is not None and large.chunks == 250 and large.per_chunk == 4


@pytest.mark.parametrize(
    ("tensor", "axis"),
    [(DEEP, 0), (DEEP, 1), (DEEP, 2), (DEEP[:, 1:3, ::2], 2), (BASE, 1), (BASE, 0), (BASE.T, None)],
)
def test_sums_are_those_along_the_axis(tensor: Tensor, axis: int | None) -> None:
    view = cuda.stats.sums_view(tensor, axis)
    assert view is not None and view.chunks == 1
    (item,) = items([view])
    found = []
    for number in range(item["rows"] * item["cols"]):
        row, column = divmod(number, item["cols"])
        start = row * item["stride"] + column * item["sums"]
        places = [start + term * item["terms"] for term in range(item["last"])]
        found.append(sum(element(item["data"] + 4 * place) for place in places))
    expected = tensor if axis is None else tensor.sum(axis)
    assert found == expected.flatten().tolist()


def test_sums_of_a_row() -> None:
    sums = Sums.of_row([4.0, 1.0, 0, 0, 0, 0, 0.5, 3.0, 4.5])
    assert sums == (4, 1, 0.5, 3.0, 1.5) and math.isnan(sums.furthest(1))
    assert sums._replace(nan=0).furthest(1.0) == 3.0 and sums._replace(nan=0).furthest(2.5) == 0.5
    assert Sums.of_row([2.0, 2.0, 0, 0, 0, 0, math.inf, -math.inf, 0]) == (2, 2, 0, 0, 0)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.5),
        torch.tensor([[1e-40, -0.0], [math.inf, -3e38]]),
        torch.tensor([0.1, 1e300], dtype=torch.float64),
        torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([7, -9], dtype=torch.int32),
        torch.tensor([[2**40], [-1]]),
        torch.tensor([True, False]),
        torch.zeros(0),
    ],
)
def test_values_come_back_from_the_integers_that_the_ring_holds(value: Tensor) -> None:
    bits = bits_of(value)
    view = cuda.stats.values_view(bits, 3)
    assert view is not None and view.rows == value.numel()
    row = torch.zeros(3 + value.numel() + 2, dtype=torch.int64)
    row[3 : 3 + value.numel()] = bits.flatten()
    found = _Place(0, 3, value.dtype, value.shape).value(row)
    assert repr(found) == repr(value.tolist())


# ------------------------------------------------------------------------------ whose memory


def call(path: str, y: Tensor) -> Call:
    return Call(Site(path, spec_of("moe_sum"), {}, 0), {}, {"y": y.as_subclass(OnDevice)})


def observe(*calls: Call) -> tuple[dict[str, Any], list[str]]:
    """abs_max, or what was complained of, by site; and the complaints."""
    heard: list[str] = []

    def complain(probe: Probe, call: Call, text: str) -> None:
        heard.append(f"{call.site.path}: {text}")

    observation = Observation(make_probes(["stats"]), complain)
    for one in calls:
        assert observation.look(one) == []
    found = {r.site: r.value for r in observation.flush() if r.name in ("abs_max", "error")}
    return found, heard


def test_an_output_where_another_lay_is_no_number() -> None:
    buffer = torch.ones(64)
    found, heard = observe(call("a", buffer[:40]), call("b", buffer[39:]), call("c", buffer[40:41]))
    assert found["c"] == 1
    assert "overwritten by b" in found["a"] and "overwritten by c" in found["b"]
    assert len(heard) == 2


def test_neighbours_in_one_buffer_are_no_conflict() -> None:
    buffer = torch.arange(64.0)
    found, heard = observe(call("a", buffer[:40]), call("b", buffer[40:]), call("c", buffer[:0]))
    assert (found, heard) == ({"a": 39, "b": 63, "c": 0}, [])


def test_an_output_is_reduced_before_an_op_that_says_it_writes_there() -> None:
    buffer = torch.ones(50, 4)
    observation = Observation(make_probes(["stats"]))
    observation.look(call("a", buffer))
    site = Site("b", spec_of("cache_write"), {}, 0)
    inputs = {
        "rows": buffer,
        "slots": torch.tensor([3, -1]).as_subclass(OnDevice),
        "cache": buffer.as_subclass(OnDevice),
    }
    write = Call(site, inputs, {})
    observation.before(write)
    buffer[3] = 7.0
    buffer[4] = torch.nan  # a row that the call does not name
    write.ran({"cache": inputs["cache"]})
    observation.look(write)
    readings = {(r.site, r.name): r.value for r in observation.flush()}
    assert readings["a", "abs_max"] == 1 and readings["b", "abs_max"] == 7
    assert readings["b", "nan"] == 0


@pytest.mark.parametrize("bad_row, found", [(1, True), (2, False)])
def test_a_write_that_makes_a_nan_is_its_origin(bad_row: int, found: bool) -> None:
    """Of the rows it was to write, whatever lies in the others."""
    cache = torch.full((4, 3), torch.nan)
    cache[1] = cache[3] = 5.0
    cache[bad_row, 2] = torch.nan
    rows, slots = torch.full((2, 3), 5.0), torch.tensor([1, 3])
    site = Site("L0/attn/window_write", spec_of("cache_write"), {}, 0)
    call = Call(site, {"rows": rows, "slots": slots, "cache": cache}, {"cache": cache})
    readings = Observation(make_probes(["stats", "nonfinite"])).look(call)
    assert {r.name: r.value for r in readings}["nan"] == (1 if found else 0)
    places = [r.value for r in readings if r.name == "first_nonfinite"]
    assert places == ([[1.0, 2.0]] if found else [])
