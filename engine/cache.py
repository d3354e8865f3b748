"""What a sequence leaves behind in every layer: window ring, compressed entries, compressor state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.config import CSA_RATIO, Config
from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.kv_entry import packed_bytes
from dsv4_bench.engine.step import Step
from dsv4_bench.engine.tokens import check_token_ids

KV_FORMATS = ("dtype", "fp8")  # keys in the activations' dtype, or packed; see kv_entry.py


class CompressorState:
    """The open window (and, at ratio 4, the previous one) of every sequence, float32.

    kv, score [b, slots, w]; unused slots hold 0 and -inf (the -inf is no alarm).
    """

    def __init__(self, batch: int, ratio: int, dim: int, device: torch.device) -> None:
        slots, width = (2 * ratio, 2 * dim) if ratio == CSA_RATIO else (ratio, dim)
        self.kv = torch.zeros(batch, slots, width, device=device)
        self.score = torch.full((batch, slots, width), -torch.inf, device=device)


class LayerCache:
    """One layer's cache for `batch` sequences.

    ring [b*window, hd]: position p is in slot p % window. entries [b, capacity, hd] and, in CSA
    layers, index_entries [b, capacity, id]: entry j in row j. Rows past the last entry are unused.
    With `kv` "fp8", ring and entries are packed: uint8, and bytes of an entry in place of hd.
    `version` counts how often tensors were replaced by others; what is written in place does not count.
    """

    def __init__(
        self,
        config: Config,
        layer: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        kv: str = "dtype",
    ) -> None:
        self.ratio = config.ratio(layer)
        self.version = 0
        width, stored = config.head_dim, dtype
        if kv == "fp8":
            width, stored = packed_bytes(width, config.qk_rope_head_dim), torch.uint8
        rows = batch * config.sliding_window
        self.ring = torch.zeros(rows, width, dtype=stored, device=device)
        self.entries: Tensor | None = None
        self.index_entries: Tensor | None = None
        self.state: CompressorState | None = None
        self.index_state: CompressorState | None = None
        if self.ratio:
            self.entries = self.ring.new_zeros(batch, 0, width)
            self.state = CompressorState(batch, self.ratio, config.head_dim, device)
        if self.ratio == CSA_RATIO:
            self.index_entries = self.ring.new_zeros(batch, 0, config.index_head_dim, dtype=dtype)
            self.index_state = CompressorState(batch, self.ratio, config.index_head_dim, device)

    def reserve(self, length: int) -> None:
        """Make room for the entries of sequences of `length` tokens; grows by doubling."""
        if not self.ratio:
            return
        needed = length // self.ratio
        for name in ("entries", "index_entries"):
            pool = getattr(self, name)
            if pool is None or pool.shape[1] >= needed:
                continue
            grown = pool.new_zeros(pool.shape[0], max(needed, 2 * pool.shape[1], 16), pool.shape[2])
            grown[:, : pool.shape[1]] = pool
            setattr(self, name, grown)
            self.version += 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by name; the live tensors, not copies."""
        named: dict[str, Tensor | None] = {
            "ring": self.ring,
            "entries": self.entries,
            "index_entries": self.index_entries,
        }
        for name, state in (("state", self.state), ("index_state", self.index_state)):
            if state is not None:
                named.update({f"{name}.kv": state.kv, f"{name}.score": state.score})
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything stored, for `restore`."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to `snapshot`, which stays usable."""
        self.version += 1
        for name, tensor in snapshot.items():
            owner, _, field = name.rpartition(".")
            target = getattr(self, owner) if owner else self
            setattr(target, field, tensor.to(self.ring.device, copy=True))


class Cache:
    """The caches of all layers and the length of every sequence.

    `kv` is one of KV_FORMATS; raises DSV4Error for another, or heads that cannot be packed.
    """

    def __init__(
        self,
        config: Config,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: str = "dtype",
    ) -> None:
        if kv not in KV_FORMATS:
            raise DSV4Error(f"unknown KV format {kv!r}", did_you_mean(kv, KV_FORMATS))
        self.config = config
        self.device = torch.device(device)
        self.lengths = [0] * batch
        self.layers = [
            LayerCache(config, layer, batch, dtype, self.device, kv)
            for layer in range(config.num_hidden_layers)
        ]

    def step(self, tokens: Sequence[Sequence[int]]) -> Step:
        """Plan a forward call that appends `tokens[b]` (at least one) to sequence b.

        Raises DSV4Error for a wrong batch size, an empty piece or an id outside the vocabulary.
        """
        if len(tokens) != len(self.lengths):
            raise DSV4Error(f"{len(tokens)} sequences given, the cache holds {len(self.lengths)}")
        for b, piece in enumerate(tokens):
            if not len(piece):
                raise DSV4Error(f"sequence {b}: no tokens", "a prompt needs at least one token")
            check_token_ids(piece, self.config.vocab_size)
        self.reserve(max(start + len(p) for start, p in zip(self.lengths, tokens, strict=True)))
        flat = torch.tensor([t for piece in tokens for t in piece], device=self.device)
        lengths = tuple(len(piece) for piece in tokens)
        return Step(flat, tuple(self.lengths), lengths, self.config.sliding_window)

    def reserve(self, length: int) -> None:
        """Make room in every layer for sequences of `length` tokens."""
        for layer in self.layers:
            layer.reserve(length)

    def advance(self, step: Step) -> None:
        """Count `step`'s tokens as cached; call it once all layers have run."""
        self.lengths = [a + b for a, b in zip(step.starts, step.lengths, strict=True)]

    def snapshot(self) -> dict[str, object]:
        return {"lengths": list(self.lengths), "layers": [c.snapshot() for c in self.layers]}

    def restore(self, snapshot: dict[str, object]) -> None:
        self.lengths = list(snapshot["lengths"])  # type: ignore[call-overload]
        for layer, saved in zip(self.layers, snapshot["layers"], strict=True):  # type: ignore[call-overload]
            layer.restore(saved)

    @property
    def version(self) -> int:
        """Changes when a layer's tensors are replaced by others."""
        return sum(layer.version for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer.tensors().values())
