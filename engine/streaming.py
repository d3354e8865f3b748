"""Weights that do not fit on the GPU: streamed from pinned host memory, a layer ahead of its use.

Some layers are resident. All tensors of each other layer lie in one flat piece of host memory, and its
`Weight` objects are views of one of two device buffers: what a site is bound to never changes, only the
bytes behind those addresses do. While layer i computes, a copy stream fills the other buffer with the
next streamed layer; events keep both from overtaking each other. After the last streamed layer of a
pass the first one is fetched for the next pass.

The parts: `plan_layers` decides what is streamed, `place` moves a model's tensors, `Streamer` orders
copies and use, `CudaCopies` carries them out. Everything but the last runs on the CPU too.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dsv4_bench.engine.cache import LayerCache
from dsv4_bench.engine.checkpoint import Checkpoint, Experts
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.model import Layer, Transformer
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step

Progress = Callable[[int, int], None]
Put = Callable[[Tensor], Tensor]

ALIGNMENT = 512  # bytes; what torch's allocator rounds to, and more than any kernel needs
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_RESERVE, _RESERVE_SHARE = 1 << 30, 8  # bytes, or an eighth of what is free: caches, activations


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# ------------------------------------------------------------------------------ how much


def parse_size(text: str) -> int:
    """``80GB``, ``1.5G``, ``512MiB``, ``123456`` -> bytes. Raises DSV4Error for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found or (found[3] and not found[2]):
        raise DSV4Error(f"{text!r} is no size in bytes", "e.g. 80GB, 512MiB or 123456")
    unit = 1024 ** "KMGT".index(found[2]) * 1024 if found[3] else _UNITS[found[2]]
    size = int(float(found[1]) * unit)
    if not 0 < size < 1 << 60:
        raise DSV4Error(f"a size of {text!r} makes no sense", "e.g. 80GB, 512MiB or 123456")
    return size


def default_budget(device: torch.device) -> int:
    """Bytes for weights: what is free on the GPU, less an eighth and at least 1 GiB for the rest."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - max(_RESERVE, free // _RESERVE_SHARE))


@dataclass(frozen=True)
class Plan:
    """Which layers are streamed, and bytes on the GPU: `resident`, and each of two buffers."""

    streamed: tuple[int, ...]
    resident: int
    buffer: int

    @property
    def total(self) -> int:
        return self.resident + 2 * self.buffer


def plan_layers(rest: int, layers: Sequence[int], budget: int) -> Plan:
    """Stream as few layers as keep weights within `budget` bytes, evenly spread over the depth.

    `layers` gives each layer's bytes, `rest` those outside all layers, which stay. Two buffers hold
    as much as two layers, so three are streamed at least. Spread, because the copy of a layer goes
    on while the resident ones before it compute. Raises CannotAnswer if two layers do not fit.
    """
    count = len(layers)
    for number in (0, *range(3, count + 1)):
        streamed = tuple((2 * i + 1) * count // (2 * number) for i in range(number))
        kept = sum(size for layer, size in enumerate(layers) if layer not in streamed)
        plan = Plan(streamed, rest + kept, max((layers[i] for i in streamed), default=0))
        if plan.total <= budget:
            return plan
    least = rest + min(sum(layers), 2 * max(layers, default=0))
    raise CannotAnswer(
        f"{budget} bytes of GPU memory for weights are too few: this checkpoint needs {least}",
        f"{rest} stay there, and two layers of at most {max(layers, default=0)}",
    )


# ------------------------------------------------------------------------------ a site's tensors


def placed(value: Any, put: Put) -> Any:
    """`value` of a site's parameters with each of its tensors as `put` returns it."""
    if isinstance(value, Tensor):
        return put(value)
    if isinstance(value, Weight):
        scale = None if value.scale is None else put(value.scale)
        return replace(value, data=put(value.data), scale=scale, _dense=None)
    if isinstance(value, Expert):
        return Expert(*(placed(weight, put) for weight in value))
    if isinstance(value, Experts):
        return value.moved(lambda expert: placed(expert, put))
    return value


def stored_bytes(value: Any) -> int:
    """What `placed` puts, each tensor padded; of a layer's experts all, opening as few as it can."""
    if isinstance(value, Experts):
        if len({value.stored_as(expert) for expert in range(len(value))}) == 1:
            return len(value) * stored_bytes(value[0])
        return sum(stored_bytes(value[expert]) for expert in range(len(value)))
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(padded(tensor.nbytes))
        return tensor

    placed(value, count)
    return sum(sizes)


def sites_of(model: Transformer, layer: int | None) -> list[Site]:
    return [site for site in model.sites.values() if site.layer == layer]


def layer_bytes(model: Transformer, layer: int | None) -> int:
    """Bytes of a layer's tensors on a device; None: of those outside all layers."""
    sites = sites_of(model, layer)
    return sum(stored_bytes(value) for site in sites for value in site.params.values())


def move(sites: Sequence[Site], put: Put) -> None:
    """Give the sites their parameters as `put` returns them, on the routes they have."""
    for site in sites:
        site.params = {name: placed(value, put) for name, value in site.params.items()}
        site.put_back(site.impl, site.stamp)


# ------------------------------------------------------------------------------ one streamed layer


class HostLayer:
    """A layer's tensors in host memory, and where each lies in the device buffer they share."""

    def __init__(self) -> None:
        self.size = 0
        self.sources: list[tuple[int, Tensor]] = []  # offset, tensor in host memory
        self.flat: Tensor | None = None

    def put(self, buffer: Tensor) -> Put:
        """Takes a layer's tensors in turn; returns their views of `buffer`, uint8 on the device."""

        def view(tensor: Tensor) -> Tensor:
            start, end = self.size, self.size + tensor.nbytes
            self.sources.append((start, tensor))
            self.size += padded(tensor.nbytes)
            return buffer[start:end].view(tensor.dtype).view(tensor.shape)

        return view

    def gather(self, allocate: Callable[[int], Tensor | None]) -> bool:
        """Copy the tensors into one piece of memory from `allocate`; False if it has none to give.

        Then they are copied from where they are, usually the mapped checkpoint, one by one."""
        flat = allocate(self.size)
        if flat is None:
            return False
        for start, tensor in self.sources:
            target = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
        self.flat, self.sources = flat, []
        return True

    def copy_to(self, buffer: Tensor) -> None:
        """Onto the device, on the current stream; asynchronous from pinned memory."""
        if self.flat is not None:
            buffer[: self.size].copy_(self.flat, non_blocking=True)
        for start, tensor in self.sources:
            target = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)


def pinned(size: int) -> Tensor | None:
    """`size` bytes of pinned host memory; None if the driver refuses, or the machine has no more.

    Registered rather than allocated as pinned: torch's allocator rounds up to a power of two.
    """
    if size > _available_memory():
        return None
    memory = torch.empty(size, dtype=torch.uint8)
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)) != 0:
        with suppress(RuntimeError):  # the next launch would find and raise the error left behind
            torch.zeros(1, device="cuda")
        return None
    weakref.finalize(memory, _unpin, memory.data_ptr()).atexit = False
    return memory


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy from it may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def _available_memory() -> int:
    """Bytes of host memory that may be taken, an eighth of the machine's left over; a lot if unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 1 << 62
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s*(\d+) kB", text)}
    if "MemAvailable" not in sizes:
        return 1 << 62
    return sizes["MemAvailable"] - sizes["MemTotal"] // 8


# ------------------------------------------------------------------------------ copies and their order


class Copies(Protocol):
    """Who copies. A buffer is filled when its last use is over, and used when it is filled."""

    device: torch.device

    def buffers(self, size: int) -> list[Tensor]: ...
    def fill(self, slot: int, copy: Callable[[], None]) -> None: ...
    def wait(self, slot: int) -> None: ...
    def release(self, slot: int) -> None: ...


class CudaCopies:
    """Copies on a stream of their own; the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event(), torch.cuda.Event()]
        self.unused = [torch.cuda.Event(), torch.cuda.Event()]

    def buffers(self, size: int) -> list[Tensor]:
        """Two of `size` bytes on the device, not used again before copies into them are over."""
        pair = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        for buffer in pair:
            buffer.record_stream(self.stream)
        self.stream.wait_stream(torch.cuda.current_stream())  # what had this memory before
        return pair

    def fill(self, slot: int, copy: Callable[[], None]) -> None:
        _refuse_capture()
        self.stream.wait_event(self.unused[slot])
        with torch.cuda.stream(self.stream):
            copy()
            self.filled[slot].record()

    def wait(self, slot: int) -> None:
        _refuse_capture()
        torch.cuda.current_stream().wait_event(self.filled[slot])

    def release(self, slot: int) -> None:
        self.unused[slot].record()


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise CannotAnswer(
            "a layer whose weights are streamed cannot be part of a CUDA graph",
            "a graph needs all layers it holds in GPU memory: a larger --gpu-memory",
        )


class Streamer:
    """Brings streamed layer k into buffer k % 2 before it runs, and the next one meanwhile."""

    def __init__(
        self, layers: Sequence[HostLayer], buffers: Sequence[Tensor], copies: Copies
    ) -> None:
        self.layers, self.buffers, self.copies = layers, buffers, copies
        self._holds: list[int | None] = [None, None]

    def _fetch(self, number: int) -> None:
        slot = number % 2
        if self._holds[slot] != number:
            self._holds[slot] = None  # until the copy is under way
            self.copies.fill(slot, partial(self.layers[number].copy_to, self.buffers[slot]))
            self._holds[slot] = number

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Inside the block, work on the current stream finds streamed layer `number` in its buffer.

        The next layer's copy is started last, so that one from pageable memory, for which the host
        waits, still runs beside the launched work.
        """
        self._fetch(number)
        self.copies.wait(number % 2)
        try:
            yield
        finally:
            self.copies.release(number % 2)
        self._fetch((number + 1) % len(self.layers))


class StreamedLayer:
    """A layer of the model that is brought to the GPU when it is called."""

    def __init__(self, layer: Layer, streamer: Streamer, number: int) -> None:
        self.layer, self.streamer, self.number = layer, streamer, number

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        with self.streamer.loaded(self.number):
            return self.layer(x, cache, step)


# ------------------------------------------------------------------------------ a model


def open_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    kv: str = "dtype",
    budget: int | None = None,
    progress: Progress | None = None,
) -> tuple[Transformer, list[str]]:
    """A model on a GPU with at most `budget` bytes of weights there, and notes for its user.

    None: `default_budget`. Every weight is read now; `progress` is told layers done and in all.
    Raises CannotAnswer if the budget does not hold two layers.
    """
    model = Transformer(checkpoint, dtype, "cpu", kv)
    layers = [layer_bytes(model, layer) for layer in range(len(model.layers))]
    limit = default_budget(device) if budget is None else budget
    plan = plan_layers(layer_bytes(model, None), layers, limit)
    unpinned = place(model, plan, CudaCopies(device), pinned, progress)
    notes = []
    if plan.streamed:
        size = sum(layers[layer] for layer in plan.streamed) / 1e9
        notes.append(
            f"{len(plan.streamed)} of {len(layers)} layers, {size:.3g} GB, are streamed from host "
            f"memory; {plan.total / 1e9:.3g} GB of the GPU's hold weights"
        )
    if unpinned:
        notes.append(
            f"{unpinned} streamed layers are not in pinned memory, which the driver refused: slower"
        )
    return model, notes


def place(
    model: Transformer,
    plan: Plan,
    copies: Copies,
    allocate: Callable[[int], Tensor | None],
    progress: Progress | None = None,
) -> int:
    """Move a model that was built on the CPU to the device of `copies` as planned; how many layers
    got no memory from `allocate`, which is to give pinned memory."""
    model.device = copies.device
    resident: Put = partial(Tensor.to, device=copies.device)
    move(sites_of(model, None), resident)
    buffers = copies.buffers(plan.buffer)
    hosts: list[HostLayer] = []
    streamer = Streamer(hosts, buffers, copies)
    unpinned = 0
    for index, layer in enumerate(model.layers):
        if index in plan.streamed:
            host = HostLayer()
            move(sites_of(model, index), host.put(buffers[len(hosts) % 2]))
            unpinned += not host.gather(allocate)
            model.layers[index] = cast(Layer, StreamedLayer(layer, streamer, len(hosts)))
            hosts.append(host)
        else:
            move(sites_of(model, index), resident)
        if progress:
            progress(index + 1, len(model.layers))
    return unpinned
