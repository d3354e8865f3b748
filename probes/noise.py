"""What honest kernels do to the logits: the reference, every output moved as far as rounding moves it

An op's honest error is what the reference itself commits against float64 in this dtype. A run whose
outputs are all moved that far at random shows what such errors add up to at the logits, and
how far they move the scores by which experts and entries are picked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.metrics import relative_error, rows_of

CALLS = 2  # of a site that are compared with float64
SAMPLES = 3  # sites of an op whose calls are compared with float64: first, middle, last layer
Amplitudes = dict[tuple[str, str], float]


def sampled_sites(sites: Iterable[Site]) -> set[str]:
    """Paths of up to SAMPLES sites of every op, spread evenly over the layers."""
    by_op: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        by_op[site.op].append(site.path)
    chosen = set()
    for paths in by_op.values():
        last = len(paths) - 1
        chosen |= {paths[round(i * last / max(SAMPLES - 1, 1))] for i in range(SAMPLES)}
    return chosen


class HonestErrors:
    """Learns from captured calls, of whatever implementation, the reference's own error on them."""

    def __init__(self) -> None:
        self.amplitudes: Amplitudes = {}
        self._learned: Counter[str] = Counter()

    def learn(self, call: Captured) -> None:
        """Compare the reference on one call's inputs with float64. Exact outputs stay unmoved.

        Of every site the first CALLS calls count.
        """
        if self._learned[call.site.path] == CALLS:
            return
        self._learned[call.site.path] += 1
        outputs = call.run(call.site.spec.reference)
        for name, exact in call.oracle().items():
            value = outputs[name]
            if not movable(call.site, name, value):
                continue
            error = relative_error(value, exact)
            if error > 0:
                key = (call.site.op, name)
                self.amplitudes[key] = max(self.amplitudes.get(key, 0.0), error)


def movable(site: Site, output: str, value: Tensor) -> bool:
    """Whether rounding can move an output: floats that the op returns, but for copies and sets."""
    spec = site.spec
    returned = output not in spec.mutates and output not in spec.discrete
    return returned and value.is_floating_point() and value.numel() > 0


class Noise:
    """A tap's observer: every output moved at random, each row by its op's amplitude.

    The same seed moves a run in the same way, whatever ran before.
    """

    def __init__(self, amplitudes: Amplitudes, seed: int) -> None:
        self.amplitudes = amplitudes
        self.generator = torch.Generator().manual_seed(seed)

    def wants(self, site: Site) -> bool:
        return any(op == site.op for op, _ in self.amplitudes)

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        return self.moved(site, site.run(args))

    def moved(self, site: Site, result: Any) -> Any:
        """`result` of `site`, every movable output a little off."""
        named = site.spec.name_outputs(result)
        changed = {
            name: self._move(value, self.amplitudes[site.op, name])
            for name, value in named.items()
            if (site.op, name) in self.amplitudes and movable(site, name, value)
        }
        if not isinstance(result, tuple):
            return next(iter(changed.values()), result)
        names = site.spec.outputs
        return tuple(changed.get(n, v) for n, v in zip(names, result, strict=False))

    def _move(self, value: Tensor, amplitude: float) -> Tensor:
        noise = torch.randn(value.shape, generator=self.generator).to(value.device)
        finite = torch.isfinite(value)
        exact = torch.where(finite, value, 0.0).float()
        typical = rows_of(exact).square().mean(1).sqrt()  # [rows]
        step = typical.reshape(-1, *[1] * (value.dim() - 1)) * amplitude
        return torch.where(finite, (exact + step * noise).to(value.dtype), value)
