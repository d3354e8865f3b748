"""Models of V4's real sizes on a GPU with random weights, made there in a second instead of written and read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.config import FLASH, Config
from dsv4_bench.engine.formats import FP8_BLOCK, NVFP4_BLOCK, Weight
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.names import expected_tensors
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.synthetic import _matrix_format, _plain

_E2M1_RMS = 2.9  # of random codes: the root of the mean square of their values


def layers_of(kinds: tuple[int, ...], config: Config = FLASH) -> Config:
    """A model of one layer a compression ratio in `kinds`, without hash layers and with few tokens."""
    return replace(
        config,
        num_hidden_layers=len(kinds),
        compress_ratios=kinds,
        num_hash_layers=0,
        vocab_size=4096,
    )


class Bank(list[Expert]):
    """A list that can be referred to weakly, so that its kernels' table goes with it."""


class RandomCheckpoint:
    """What Transformer asks of a Checkpoint, with random weights in GPU memory.

    Formats are those of a synthetic `layout`; outputs of a matrix are about as large as its inputs.
    Layer i has the routed experts of layer i % `banks`, so that a whole model fits.
    """

    def __init__(
        self, config: Config, layout: str = "nvfp4", device: str = "cuda", banks: int = 1024
    ) -> None:
        self.config, self.layout, self.device = config, layout, torch.device(device)
        self._banks: dict[int, Bank] = {}
        self._count = banks
        self.folder = Path(f"random {layout}")
        self._items = {item.name: item for item in expected_tensors(config)}
        self._rng = torch.Generator().manual_seed(1)
        torch.manual_seed(1)

    def tensor(self, name: str) -> Tensor:
        if self._items[name].kind == "ids":  # experts of every token: different ones
            tokens, k = self._items[name].shape
            first = torch.randint(self.config.n_routed_experts, (tokens, 1), generator=self._rng)
            return (first + 37 * torch.arange(k)) % self.config.n_routed_experts
        value = _plain(self._items[name], self.config.hc_mult, self._rng)
        return value.bfloat16() if name.endswith("norm.weight") else value

    def weight(self, name: str) -> Weight:
        shape = self._items[name].shape
        form = _matrix_format(name, self.layout)
        (data,), (scale,), gain = self._stored(form, 1, shape)
        return Weight(name, form, data, scale, gain)

    def _stored(self, form: str, count: int, shape: Any) -> tuple[Any, Any, float]:
        """`count` matrices [n, k]: data and scales, each [count, ...], and the global scale."""
        n, k = shape
        gain = k**-0.5
        if form == "dense":
            data = torch.randn(count, n, k, device=self.device, dtype=torch.bfloat16) * gain
            return data, [None] * count, 1.0
        if form == "fp8_block":
            data = torch.randn(count, n, k, device=self.device, dtype=torch.bfloat16)
            blocks = (count, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
            scale = torch.full(blocks, gain, device=self.device).to(torch.float8_e8m0fnu)
            return data.to(torch.float8_e4m3fn), scale, 1.0
        assert form == "nvfp4", form
        data = torch.randint(256, (count, n, k // 2), device=self.device, dtype=torch.uint8)
        scale = torch.rand(count, n, k // NVFP4_BLOCK, device=self.device) + 0.5
        return data, scale.to(torch.float8_e4m3fn), gain / _E2M1_RMS

    def experts(self, layer: int, device: object = None) -> Bank:
        number = layer % self._count
        if number not in self._banks:
            self._banks[number] = self._bank(number)
        return self._banks[number]

    def _bank(self, layer: int) -> Bank:
        c = self.config
        i, d = c.moe_intermediate_size, c.hidden_size
        name = f"layers.{layer}.ffn.experts.0.w1"
        form, parts = _matrix_format(name, self.layout), []
        for leaf, shape in (("w1", (i, d)), ("w2", (d, i)), ("w3", (i, d))):
            data, scale, gain = self._stored(form, c.n_routed_experts, shape)
            parts.append(
                [Weight(f"{leaf}.{e}", form, data[e], scale[e], gain) for e in range(len(data))]
            )
        return Bank(Expert(*three) for three in zip(*parts, strict=True))

    def shared_expert(self, layer: int, device: object = None) -> Expert:
        prefix = f"layers.{layer}.ffn.shared_experts."
        return Expert(*(self.weight(prefix + leaf) for leaf in Expert._fields))


def random_model(
    config: Config, layout: str = "nvfp4", device: str = "cuda", banks: int = 1024
) -> Transformer:
    checkpoint = RandomCheckpoint(config, layout, device, banks)
    return Transformer(checkpoint, torch.bfloat16, device)  # type: ignore[arg-type]


def filled_cache(model: Transformer, batch: int, length: int, room: int) -> Cache:
    """A cache as after `length` tokens of every sequence, random, with room for more."""
    cache = model.new_cache(batch)
    cache.reserve(length + room)
    for layer in cache.layers:
        for tensor in layer.tensors().values():
            tensor.normal_()
    cache.lengths = [length] * batch
    return cache
