"""The fused statistics kernel: which part of a tensor to read, many of them in one launch, results in a ring.

A result is a row of `FIELDS` float64, what `probes.stats.Stats.of_row` reads; counts are exact below 2^53. Every
tensor is read once, in chunks that depend on its shape alone, and the chunks are added in their order:
the same values in the same layout give the same bits, whatever else is in the launch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import I, Library, N, P, unavailable
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import Context

FIELDS = 9
BINS = 256  # one for every exponent of float32: 0 zero and subnormal, 255 infinite and NaN
MOST_ITEMS = 96  # of a launch, as in probes_sm90.cu
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dsv4_dtype

_CHUNK = 2048  # elements that a block reads at least
_MOST_CHUNKS = 1024  # of a tensor
_MOST_ELEMENTS = 1 << 32  # counts have 32 bits
_PART = 6  # doubles of scratch a chunk
_MOMENTS, _SUMS, _VALUES, _EMPTY = 0, 1, 2, 3
_ITEM = struct.Struct("@PPqqqqiiiiiiii")

PROBES = Library(
    "probes",
    {
        "probe_stats": (P, N, N, P, P, P, P, N, N, N, P, P, P),
        "probe_begin": (P,),
        "probe_stamp": (P, P, N, N, I, I),
    },
)


class View(NamedTuple):
    """What the kernel reads: `rows` of `cols` elements, `stride` apart, the last one with `last`.

    `row_index` [rows] int64 names the rows instead, below 0 for none. Of kind sums: `rows` x `cols` sums of
    `last` terms each. Of kind values: `rows` integers to copy, and of kind empty: rows to count in, to
    column `last` of a ring's copies. A block reads `per_chunk` rows. The
    tensors are kept so that they live on.
    """

    tensor: Tensor
    row_index: Tensor | None
    rows: int
    cols: int
    last: int
    stride: int
    per_chunk: int = 1
    kind: int = _MOMENTS
    sum_stride: int = 0
    term_stride: int = 0

    @property
    def chunks(self) -> int:
        """Blocks that read it; an empty one takes a block too, which writes its zeros."""
        whole = self.kind in (_SUMS, _VALUES)
        return 1 if whole else max(-(-self.rows // self.per_chunk), 1)


def moments_view(tensor: Tensor, index: Tensor | None = None) -> View | None:
    """All of `tensor`, or its rows `index` along the first axis; None if it is not read: a dtype, or
    2^32 elements and more.

    Read in place if all axes but one collapse to contiguous rows, as they do in any view of rows or
    columns; from a copy otherwise.
    """
    if tensor.dtype not in DTYPES or tensor.numel() >= _MOST_ELEMENTS:
        return None
    if index is not None:
        rows = tensor if tensor.flatten(1).stride(-1) == 1 else tensor.contiguous()
        width = rows[0].numel() if len(rows) else 0
        wanted = index if index.dtype == torch.int64 else index.long()
        return _rows(rows, wanted.contiguous(), len(wanted), width, rows.stride(0))
    layout = _layout(tensor.shape, tensor.stride())
    if layout is None:
        tensor = tensor.contiguous()
        layout = _layout(tensor.shape, tensor.stride())
        assert layout is not None
    return View(tensor, None, *layout)


def _rows(tensor: Tensor, index: Tensor, rows: int, cols: int, stride: int) -> View:
    return View(tensor, index, rows, cols, cols, stride, _per_chunk(rows, cols))


def _per_chunk(rows: int, cols: int) -> int:
    return max(_CHUNK // max(cols, 1), -(-rows // _MOST_CHUNKS), 1)


@lru_cache(4096)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int, int, int] | None:
    """rows, cols, last, stride, per_chunk of a View of everything; None if it must be copied first."""
    axes = _collapsed(shape, strides)
    if axes is None:
        return None
    if len(axes) == 2:
        (rows, stride), (cols, _) = axes
        return rows, cols, cols, stride, _per_chunk(rows, cols)
    total = axes[0][0]
    chunk = _CHUNK
    while chunk * _MOST_CHUNKS < total:
        chunk *= 2
    count = -(-total // chunk)
    return count, chunk, total - (count - 1) * chunk if count else 0, chunk, 1


def _collapsed(shape: torch.Size, strides: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """(size, stride) of the one or two axes that these come to, the inner one of stride 1."""
    if 0 in shape:
        return [(0, 1)]
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if not axes:
        return [(1, 1)]
    return axes if axes[-1][1] == 1 and len(axes) <= 2 else None


def sums_view(tensor: Tensor, axis: int | None) -> View | None:
    """The sums along `axis` of a tensor [n, ...] of up to three axes; None: the values themselves.

    None if the tensor is not read by the kernel.
    """
    if tensor.dtype not in DTYPES or not 1 <= tensor.dim() <= 3:
        return None
    sizes, strides = list(tensor.shape), list(tensor.stride())
    terms, term_stride = 1, 0
    if axis is not None:
        terms, term_stride = sizes.pop(axis), strides.pop(axis)
    if len(sizes) > 2:
        return None
    sizes, strides = [1] * (2 - len(sizes)) + sizes, [0] * (2 - len(sizes)) + strides
    return View(
        *(tensor, None, sizes[0], sizes[1], terms, strides[0]),
        kind=_SUMS,
        sum_stride=strides[1],
        term_stride=term_stride,
    )


def values_view(tensor: Tensor, at: int) -> View | None:
    """All integers of `tensor`, for column `at` of a ring's copies; None if they are no integers."""
    if tensor.dtype not in (torch.int32, torch.int64):
        return None
    tensor = tensor.contiguous()
    return View(tensor, None, tensor.numel(), 1, at, 1, kind=_VALUES)


def empty_view(tensor: Tensor, at: int) -> View | None:
    """The rows [..., n] of `tensor`, to count what is -infinity in each, or below 0 of integers.

    The counts go to column `at` of a ring's copies. None for another dtype.
    """
    if tensor.dtype not in DTYPES and tensor.dtype not in (torch.int32, torch.int64):
        return None
    tensor = tensor.contiguous()
    cols = tensor.shape[-1]
    rows = tensor.numel() // cols if cols else 0
    per_chunk = max(_CHUNK // max(cols, 1), 1)
    return View(tensor, None, rows, cols, at, cols, per_chunk, kind=_EMPTY)


@lru_cache
def available(device: torch.device, library: Library = PROBES) -> bool:
    """Whether the probes' kernels in `library` run on `device`; builds them if need be."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        if unavailable(library.name, Context("cuda", torch.float32), (torch.float32,)):
            return False
    try:
        library.load()
    except CannotAnswer:
        return False
    return True


@lru_cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """What blocks count themselves in with; a launch leaves it as it was, so a stream can share one."""
    return torch.zeros(MOST_ITEMS, dtype=torch.int32, device=device)


def packed(views: Sequence[View], first_slot: int = 0) -> bytearray:
    """The kernel's description of `views`, in their order: an array of dsv4_probe_item."""
    buffer, chunk = bytearray(_ITEM.size * len(views)), 0
    for number, view in enumerate(views):
        _ITEM.pack_into(
            buffer,
            number * _ITEM.size,
            view.tensor.data_ptr(),
            0 if view.row_index is None else view.row_index.data_ptr(),
            *(view.rows, view.cols, view.last, view.stride),
            *(_kind_of(view), view.kind, first_slot + number),
            *(view.per_chunk, chunk, view.sum_stride, view.term_stride, 0),
        )
        chunk += view.chunks
    return buffer


def _kind_of(view: View) -> int:
    """The code of its elements: a dtype, or the size of an integer."""
    return DTYPES.get(view.tensor.dtype, view.tensor.element_size())


class Ring:
    """Results of the last `steps` steps, `slots` in each, on `device`.

    values [steps, slots, FIELDS] float64; exponents [steps, slots, BINS] int32 if wanted; copies
    [steps, width] int64, integers as they were. step [1] int64 counts the steps that have begun: on the
    device, so that a graph that is replayed writes the next row.
    """

    def __init__(
        self,
        device: torch.device,
        slots: int,
        steps: int = 1,
        exponents: bool = False,
        width: int = 0,
    ) -> None:
        self.values = torch.zeros(steps, slots, FIELDS, dtype=torch.float64, device=device)
        self.exponents = (
            torch.zeros(steps, slots, BINS, dtype=torch.int32, device=device) if exponents else None
        )
        self.copies = torch.zeros(steps, width, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.arrived = torch.zeros(MOST_ITEMS, dtype=torch.int32, device=device)
        self._scratch: list[Tensor] = []
        self._seen = 0
        self._warm_up()

    def _warm_up(self) -> None:
        """Launch once, so that a capture need not load the kernel; what it writes is overwritten."""
        if self.values.numel():
            nothing = View(self.values, None, 0, 1, 0, 1, kind=_VALUES)
            launch([nothing], self.values, 0, self.arrived, self.exponents, self.copies)

    def begin(self) -> None:
        """What is launched from now on belongs to the next step. Captured, every replay begins one."""
        PROBES.call("probe_begin", self.step, self.step.data_ptr())

    def launch(self, views: Sequence[View], first_slot: int = 0) -> None:
        """Put the statistics of `views` into the step that was begun last, in one launch (of 96 views each).

        Captured in a CUDA graph, every replay does it anew; the tensors must then keep their memory, and
        so must this ring.
        """
        where = (self.arrived, self.exponents, self.copies, self.step)
        self._scratch += launch(views, self.values, first_slot, *where)

    def forget(self) -> None:
        """Let go of what launches needed: the graph that holds them is gone."""
        self._scratch = []

    def fetch(self, used: int | None = None, copied: int | None = None) -> list[Row]:
        """What the steps since the last fetch left in the first `used` slots and `copied` columns. Waits.

        Steps that the ring has overwritten are left out: a gap in the numbers shows them.
        """
        steps = len(self.values)
        done = int(self.step.item())
        numbers = list(range(max(self._seen, done - steps), done))
        self._seen = done
        rows = [number % steps for number in numbers]
        columns = [self.values[rows, :used], self.copies[rows, :copied]]
        if self.exponents is not None:
            columns.append(self.exponents[rows, :used])
        on_host = [column.cpu() for column in columns]
        return [Row(number, *(column[i] for column in on_host)) for i, number in enumerate(numbers)]


class Row(NamedTuple):
    """One step of a ring on the host: its number, from 0, and what Ring says of each."""

    number: int
    values: Tensor
    copies: Tensor
    exponents: Tensor | None = None


def launch(
    views: Sequence[View],
    values: Tensor,
    first_slot: int = 0,
    arrived: Tensor | None = None,
    exponents: Tensor | None = None,
    copies: Tensor | None = None,
    step: Tensor | None = None,
) -> list[Tensor]:
    """Statistics of `views` into values [steps, slots, FIELDS], from slot `first_slot` on.

    Returns the scratch memory, which must live until the launch is over (or with its graph).
    """
    steps, slots, _ = values.shape
    if arrived is None:
        stream = torch.cuda.current_stream(values.device).cuda_stream
        arrived = _counters(values.device, stream)
    scratch: list[Tensor] = []
    for first in range(0, len(views), MOST_ITEMS):
        part = views[first : first + MOST_ITEMS]
        items, chunks = packed(part, first_slot + first), sum(view.chunks for view in part)
        scratch.append(values.new_empty(chunks * _PART))
        bins = None
        if exponents is not None:
            bins = exponents.new_empty(chunks * BINS)
            scratch.append(bins)
        PROBES.call(
            "probe_stats",
            values,
            ctypes.addressof(ctypes.c_char.from_buffer(items)),
            *(len(part), chunks, values.data_ptr()),
            None if exponents is None else exponents.data_ptr(),
            None if copies is None else copies.data_ptr(),
            None if step is None else step.data_ptr(),
            *(steps, slots, 0 if copies is None else copies.shape[1]),
            scratch[-1 if bins is None else -2].data_ptr(),
            None if bins is None else bins.data_ptr(),
            arrived.data_ptr(),
        )
    return scratch


class Stamps:
    """Device time stamps of the last `steps` steps: times [steps, slots] int64, in nanoseconds.

    A stamp is a launch of its own and keeps the kernels around it from overlapping.
    """

    def __init__(self, device: torch.device, slots: int, steps: int) -> None:
        self.times = torch.zeros(steps, slots, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = 0

    def stamp(self, slot: int, begin: bool = False) -> None:
        """The time when everything before this in the stream is done; `begin`: the first of a step."""
        steps, slots = self.times.shape
        where = (self.times.data_ptr(), self.step.data_ptr(), steps, slots)
        PROBES.call("probe_stamp", self.times, *where, slot, int(begin))

    def fetch(self) -> Tensor:
        """[steps since the last fetch, slots] on the host, as many as the ring still holds. Waits."""
        steps, done = len(self.times), int(self.step.item())
        rows = [number % steps for number in range(max(self._seen, done - steps), done)]
        self._seen = done
        return self.times[rows].cpu()
