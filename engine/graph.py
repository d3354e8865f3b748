"""The decode step of the whole model, or of a range of layers, as one CUDA graph.

A graph holds launches with fixed addresses and shapes, so the step's positions live on the device
(`FixedStep`) and its shapes fit sequences up to a limit; past it, or when a route or the cache's
tensors have changed, the step is captured anew. What a capture cannot hold, such as an op that waits
for the device, is a CannotAnswer that names the site.

The kernels are those of the eager kernel route on the same inputs, but for index tensors that are
longer by entries nobody sees. Those change how the attention and the top-k divide their work, hence
the order of sums: results agree to rounding, and with `fuse` False exactly with an eager run of the same
`FixedStep`; launches of several sites may round otherwise, see cuda/fused.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.cuda.fusion import Fusions
from dsv4_bench.engine.cuda.step import CudaStep
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.graph_branches import Branches, Clock, Observer
from dsv4_bench.engine.model import Layer, Transformer
from dsv4_bench.engine.registry import Context, Site
from dsv4_bench.engine.tokens import check_token_ids

_ROUND, _SLACK = 128, 256  # tokens


def limit_for(length: int) -> int:
    """The length that a capture is made for when sequences have `length` tokens: an eighth more, at
    least 256, rounded up to 128. Attention takes time for entries that may come."""
    return -(-(length + max(_SLACK, length // 8)) // _ROUND) * _ROUND


def fixed_step(model: Transformer, cache: Cache, limit: int, tokens: Tensor) -> FixedStep:
    """A step in front of the cache's next token, for sequences of at most `limit` tokens."""
    cache.reserve(limit)
    capacities = {c.ratio: c.entries.shape[1] for c in cache.layers if c.entries is not None}
    positions = torch.tensor(cache.lengths, device=cache.device) - 1
    context = Context(cache.device.type, torch.float32)
    kernels = cuda.library.unavailable("step", context, [torch.float32]) is None
    kind = CudaStep if kernels else FixedStep
    return kind(tokens, positions, model.config.sliding_window, limit, capacities)


class DecodeGraph:
    """One token for every sequence of `cache`, replayed from a CUDA graph.

    `layers` None: everything from token ids to logits, called with `forward`; a range: these layers
    from residual streams to residual streams, called with `run`. `observer` and `clock` put
    launches of their own into the graph, see graph_branches.py. With `branches` sites that do not
    depend on each other run side by side; with `fuse`, and without a clock, some share a launch, see
    cuda/fusion.py.

    Raises CannotAnswer if the step cannot be captured. Sites run as routed when it was captured.
    """

    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        layers: range | None = None,
        *,
        observer: Observer | None = None,
        clock: Clock | None = None,
        branches: bool = True,
        fuse: bool = True,
    ) -> None:
        self.model, self.cache, self.layers = model, cache, layers
        _check_place(model, self._covered())
        self.observer, self.clock, self.branches = observer, clock, branches
        self.fuse = fuse and clock is None
        self.captures = 0
        self._lengths: list[int] = []  # of the sequences, as the device counts them
        self._warm = -1  # Site.switches when every site had run
        config, batch = model.config, len(cache.lengths)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self._x = torch.zeros(
            batch, config.hc_mult, config.hidden_size, dtype=model.dtype, device=model.device
        )
        self._capture()

    # -- running

    def forward(self, tokens: Sequence[int] | None = None) -> Tensor:
        """Append one token to every sequence: logits [b, v] float32, valid until the next call.

        Without `tokens` those that the last call chose (greedily; a NaN chooses token 0).
        """
        if self.layers is not None:
            raise DSV4Error(
                "this graph holds some layers only", "call run(x), or make it without layers"
            )
        if tokens is not None:
            self._give(tokens)
        self._ready()
        self.replay()
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return self._result

    def run(self, x: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """The layers on residual streams x [b, hc, d], for the position after the cache's lengths,
        which stay as they are: [b, hc, d], valid until the next call. Hash layers read `tokens`."""
        if self.layers is None:
            raise DSV4Error("this graph starts from token ids", "call forward(tokens)")
        if tokens is not None:
            self._give(tokens)
        self._ready()
        self._x.copy_(x)
        self.replay()
        return self._result

    def replay(self) -> None:
        """Launch the graph as it is: the next position, on the buffers' contents."""
        self._graph.replay()
        self._lengths = [length + 1 for length in self._lengths]

    @property
    def choice(self) -> Tensor:
        """[b] int64: the greedy next tokens, -1 where the logits are not finite."""
        return self._choice

    def sites(self) -> list[tuple[str, int, int]]:
        """(path, first node, nodes) of every site in order of capture; nodes count from 0. A site that
        was fused into a later one has none."""
        return self._sites

    def nodes(self) -> list[str]:
        """The mangled name of every node's kernel, "" for copies and fills."""
        return self._nodes

    def _give(self, tokens: Sequence[int]) -> None:
        if len(tokens) != len(self._tokens):
            raise DSV4Error(f"{len(tokens)} tokens given, the cache holds {len(self._tokens)}")
        check_token_ids(tokens, self.model.config.vocab_size)
        self._tokens.copy_(torch.tensor(tokens))

    def _ready(self) -> None:
        """Capture anew if the graph is not for this step; put the positions right."""
        lengths = self.cache.lengths
        state = (Site.switches, self.cache.version)
        if state != self._state or max(lengths) >= self.step.limit:
            self._capture()
        elif lengths != self._lengths:  # somebody set the cache back
            self.step.positions.copy_(torch.tensor(lengths) - 1)
        self._lengths = list(lengths)

    # -- capturing

    def _covered(self) -> range:
        return range(len(self.model.layers)) if self.layers is None else self.layers

    def _run_layers(self, x: Tensor, step: FixedStep, branches: Branches) -> Tensor:
        fixed = step.tensors()
        for layer in self._covered():
            cache = self.cache.layers[layer]
            with branches.part([x, *fixed, *cache.tensors().values()]):
                x = self.model.layers[layer](x, cache, step)
        return x

    @torch.inference_mode()
    def _body(self, step: FixedStep, branches: Branches) -> None:
        step.advance()
        if self.layers is not None:
            self._result = self._run_layers(self._x, step, branches)
            return
        with branches.part(step.tensors()):
            x = self.model.embed(step.tokens)
        x = self._run_layers(x, step, branches)
        with branches.part([x]):
            self._result = self.model.head(x)
        finite = torch.isfinite(self._result).all(-1)
        self._choice = torch.where(finite, self._result.argmax(-1), -1)
        step.tokens.copy_(self._choice.clamp(min=0))

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()  # lets go of the old one and its memory
        if self._warm != Site.switches:
            self._warm_up()
        limit = limit_for(max(self.cache.lengths) + 1)
        self.step = fixed_step(self.model, self.cache, limit, self._tokens)
        branches: Branches | None = None
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                origin = torch.cuda.current_stream()
                try:
                    observed = self.observer is not None
                    fusions = Fusions(
                        self.model.sites, self.fuse, self.model.dtype, self._covered(), observed
                    )
                    branches = Branches(self.observer, self.clock, self.branches, fusions)
                    with self._tapped(branches.around):
                        self._body(self.step, branches)
                    branches.finish()
                    self._sites, self._nodes = branches.sites, branches.nodes.names()
                finally:
                    torch.cuda.set_stream(origin)
        except RuntimeError as error:
            raise _refusal(branches.failed if branches else None, error) from error
        self._state = (Site.switches, self.cache.version)
        self._lengths = list(self.cache.lengths)
        self.captures += 1

    def _warm_up(self) -> None:
        """Run every site twice on a cache of its own: a capture cannot hold what first calls build and
        pack, nor what waits for the device, which the second time is an error."""
        cache = self.model.new_cache(len(self.cache.lengths))
        step = fixed_step(self.model, cache, _ROUND, torch.zeros_like(self._tokens))
        step.advance()
        with self._tapped(lambda site, args: site.run(args)):
            self._run_eagerly(step, cache)
        torch.cuda.synchronize()
        with self._tapped(_must_not_wait), _waiting_is_an_error():
            self._run_eagerly(step, cache)
        self._warm = Site.switches

    @torch.inference_mode()
    def _run_eagerly(self, step: FixedStep, cache: Cache) -> None:
        x = self._x if self.layers is not None else self.model.embed(step.tokens)
        for layer in self._covered():
            x = self.model.layers[layer](x, cache.layers[layer], step)
        if self.layers is None:
            self.model.head(x)

    @contextmanager
    def _tapped(self, around: Callable[[Site, tuple[Any, ...]], Any]) -> Iterator[None]:
        """All sites run through `around`; taps and counts of launches are put back afterwards."""
        sites = self.model.sites.values()
        before = [(site, site.tap, site.stamp.launches) for site in sites]
        try:
            for site in sites:
                site.tap = around
            yield
        finally:
            for site, tap, launches in before:
                site.tap, site.stamp.launches = tap, launches


def _check_place(model: Transformer, layers: range) -> None:
    if model.device.type != "cuda":
        raise CannotAnswer(
            f"a CUDA graph needs a GPU, the model is on {model.device}", "leave out the graph"
        )
    for number in layers:
        if not isinstance(model.layers[number], Layer):
            raise CannotAnswer(
                f"L{number}: a layer whose weights are streamed cannot be part of a CUDA graph",
                "a graph needs all its layers in GPU memory: a larger --gpu-memory",
            )


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _must_not_wait(site: Site, args: tuple[Any, ...]) -> Any:
    try:
        return site.run(args)
    except RuntimeError as error:
        raise _refusal(site, error) from error


def _refusal(site: Site | None, error: Exception) -> CannotAnswer:
    text = (str(error).splitlines() or [""])[0]
    if site is None:
        return CannotAnswer(f"the step cannot be captured: {text}", "run it without a CUDA graph")
    name = site.stamp.implementation
    return CannotAnswer(
        f"{site.path}: {name} cannot be captured in a CUDA graph: {text}",
        f"give it a kernel, as with --route {site.path}=sm90, or run without a graph",
    )
