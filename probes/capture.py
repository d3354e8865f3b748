"""Ops as they ran, kept so that they can be run again: on another implementation, or in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.layout import clone_tensors, storage_key


@dataclass
class Captured:
    """One op: its arguments, those it writes in place as copies from before, and its outputs.

    `cached` names the arguments that lie in the model's cache.
    """

    site: Site
    args: tuple[Any, ...]
    before: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()

    @property
    def inputs(self) -> dict[str, Any]:
        """Run-time and constant arguments by name, in-place ones as they were before."""
        return {**self.site.spec.bind(self.args, self.site.params), **self.before}

    def run(self, function: Callable[..., Any], **changed: Any) -> dict[str, Tensor]:
        """Outputs of `function` on these inputs, in-place arguments included; nothing is modified.

        `changed` replaces arguments by name.
        """
        inputs = self.inputs
        if self.before:  # together, so that an argument that shares their memory still does
            tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
            inputs.update(clone_tensors(tensors))
        return self.call(function, {**inputs, **changed})

    def call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Outputs of `function` on `inputs`, every argument by name; in-place ones are written."""
        spec = self.site.spec
        names = spec.parameters[: len(self.args)]
        params = {name: inputs[name] for name in self.site.params}
        result = function(*(inputs[name] for name in names), **params)
        outputs = spec.name_outputs(result)
        return {**outputs, **{name: inputs[name] for name in self.before}}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """`oracle()` of the inputs as they are, computed once."""
        return self.oracle()

    def oracle(self, **changed: Any) -> dict[str, Tensor]:
        """The reference in float64 on these inputs, weights dequantised exactly.

        `changed` replaces arguments by name.
        """
        inputs = {**self.inputs, **changed}
        wide = {name: _double(name, value) for name, value in inputs.items()}
        if "out_dtype" in wide:
            wide["out_dtype"] = None
        with double_precision():
            return self.run(self.site.spec.reference, **wide)


def _double(name: str, value: Any) -> Any:
    if name == "freqs":  # angles are float32 by definition
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value


def within(arguments: Mapping[str, Any], stored: Iterable[Tensor]) -> frozenset[str]:
    """The names of the arguments that share memory with one of `stored`."""
    memory = {storage_key(tensor) for tensor in stored}
    return frozenset(
        n for n, a in arguments.items() if isinstance(a, Tensor) and storage_key(a) in memory
    )


class Capture:
    """A tap's observer that keeps every op it wants, as it runs on its route.

    `stored` gives the tensors of the model's cache, so that a capture can tell them from activations.
    """

    def __init__(
        self,
        wanted: Callable[[Site], bool] = lambda site: True,
        stored: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.wanted = wanted
        self.stored = stored
        self.calls: list[Captured] = []

    def wants(self, site: Site) -> bool:
        return self.wanted(site)

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        # Copies: a later op of the layer may write what this one read (the window ring). They keep
        # strides, padding and aliasing: a kernel that gets those wrong has to get it wrong again.
        bound = dict(zip(site.spec.parameters, args, strict=False))
        tensors = clone_tensors({n: a for n, a in bound.items() if isinstance(a, Tensor)})
        kept = tuple(tensors.get(name, a) for name, a in bound.items())
        before = {name: tensors[name] for name in site.spec.mutates}
        cached = within(bound, self.stored())
        result = site.run(args)
        outputs = dict(site.spec.name_outputs(result))
        outputs.update(clone_tensors({name: bound[name] for name in site.spec.mutates}))
        self.calls.append(Captured(site, kept, before, outputs, cached))
        return result
