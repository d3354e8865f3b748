"""How large the capture of an op will be, from the model's shapes alone, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_bench.engine.cache import LayerCache
from dsv4_bench.engine.config import Config
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.bundle.values import is_bank, tensors_of

_SLACK = 128  # bytes a storage may grow by alignment, and its header entry
_STORAGES = 8  # most storages of a call


@dataclass(frozen=True)
class Estimate:
    """Upper bounds in bytes: of the run-time tensors of a call, and of its site's constants.

    Outputs count twice, as those of the route and of the reference. `constants` are stored once a
    site, but for an expert bank, whose part grows with the calls: it is in `call`.
    """

    call: int
    constants: int


class Shapes:
    """Elements of an op's arguments and outputs: width of the activations, caches, index tables."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.config = config
        self.size = dtype.itemsize  # of an activation

    def call_bytes(self, site: Site, step: Step, cache: LayerCache | None) -> int:
        """Bytes of inputs and twice the outputs of one call. `cache` has room for the step."""
        n = len(step.tokens)
        inputs, outputs = getattr(self, f"_{site.op}")(site, step, cache, n)
        return int(inputs + 2 * outputs)

    # Each method gives (bytes of inputs, bytes of outputs); 4 bytes are float32 or int32.

    def _embed(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        return 8 * n, self.size * n * self.config.hc_mult * self.config.hidden_size

    def _hc_pre(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        hc, d = self.config.hc_mult, self.config.hidden_size
        return self.size * n * hc * d, n * (self.size * d + 4 * hc + 4 * hc * hc)

    def _hc_post(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        hc, d = self.config.hc_mult, self.config.hidden_size
        streams = self.size * n * hc * d
        return streams + n * (self.size * d + 4 * hc + 4 * hc * hc), streams

    def _hc_head(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        hc, d = self.config.hc_mult, self.config.hidden_size
        return self.size * n * hc * d, self.size * n * d

    def _rms_norm(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c, weight = self.config, site.params["weight"]
        if weight is None:  # of each query head
            width = c.num_attention_heads * c.head_dim
        else:
            width = weight.numel()
        tensor = self.size * self._rows(site, step, n) * width
        return tensor, tensor

    def _linear(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        rows, columns = site.params["weight"].shape
        out_dtype = site.params["out_dtype"]
        size = self.size if out_dtype is None else out_dtype.itemsize
        return self.size * n * columns, size * n * rows

    def _grouped_linear(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        rows, columns = site.params["weight"].shape
        return self.size * n * columns * site.params["groups"], self.size * n * rows

    def _rope(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c = self.config
        rows = self._rows(site, step, n)
        if site.path.endswith(("/q_rope", "/o_rope")):
            width = c.num_attention_heads * c.head_dim
        elif site.path.endswith("/index/rope"):
            width = c.index_n_heads * c.index_head_dim
        else:
            width = self._entry_width(site)
        return rows * (self.size * width + 8), self.size * rows * width

    def _cache_write(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        rows, width = self._rows(site, step, n), self._entry_width(site)
        pool: torch.Tensor | None = cache.ring
        if "/compressor/" in site.path:
            pool = cache.index_entries if "/index/" in site.path else cache.entries
        assert pool is not None
        return rows * (self.size * width + 8) + pool.nbytes, pool.nbytes

    def _gather_swa(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        tensor = cache.ring.nbytes + self.size * n * self.config.head_dim
        return tensor, tensor

    def _compressor(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        state = cache.index_state if "/index/" in site.path else cache.state
        assert state is not None
        width = state.kv.shape[2]
        states = state.kv.nbytes + state.score.nbytes
        pooled = 4 * self._new_entries(site, step) * width
        return 8 * n + 8 * n * width + states, pooled + states

    def _index_score(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c = self.config
        assert cache.index_entries is not None
        q = self.size * n * c.index_n_heads * (c.index_head_dim + 1)
        scores = 4 * n * step.entries(site.params["ratio"])
        return q + 8 * n + cache.index_entries.nbytes, scores

    def _index_topk(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        total = step.entries(cache.ratio)
        return n * (4 * total + 8), 4 * n * min(total, site.params["k"])

    def _attention(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c = self.config
        q = self.size * n * c.num_attention_heads * c.head_dim
        fresh = 0 if step.is_decode else self.size * n * c.head_dim
        window = cache.ring.nbytes + fresh + 4 * n * c.sliding_window
        entries = 0
        if cache.entries is not None:
            total = step.entries(cache.ratio)
            columns = min(total, c.index_topk) if cache.index_entries is not None else total
            entries = cache.entries.nbytes + 4 * n * columns
        return q + window + entries, q + 4 * n * c.num_attention_heads

    def _gate(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c = self.config
        return n * (self.size * c.hidden_size + 8), n * (
            8 * c.num_experts_per_tok + 4 * c.n_routed_experts
        )

    def _experts(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        c = self.config
        bank = site.params["bank"]
        used = min(len(bank), n * c.num_experts_per_tok)
        inputs = n * (self.size * c.hidden_size + 8 * c.num_experts_per_tok)
        return inputs + used * bank[0].nbytes, 4 * n * c.hidden_size

    def _shared_expert(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        return self.size * n * self.config.hidden_size, 4 * n * self.config.hidden_size

    def _moe_sum(self, site: Site, step: Step, cache: LayerCache, n: int) -> tuple[int, int]:
        return 8 * n * self.config.hidden_size, self.size * n * self.config.hidden_size

    # -- the compressor's sites work on the entries that close, not on tokens

    def _rows(self, site: Site, step: Step, n: int) -> int:
        """Rows of the site's main argument; only the last token of a sequence reaches no op less."""
        return self._new_entries(site, step) if "/compressor/" in site.path else n

    def _new_entries(self, site: Site, step: Step) -> int:
        assert site.layer is not None
        ratio = self.config.ratio(site.layer)
        return sum(
            step.entries_of(b, ratio) - start // ratio for b, start in enumerate(step.starts)
        )

    def _entry_width(self, site: Site) -> int:
        return self.config.index_head_dim if "/index/" in site.path else self.config.head_dim


def estimate(site: Site, step: Step, cache: LayerCache | None, shapes: Shapes) -> Estimate:
    """What the capture of `site` in `step` will need at most. `cache` is its layer's, grown for the step."""
    constants, count = 0, 0
    for name, value in site.params.items():
        if is_bank(value):  # its part is in the call: it depends on who is chosen
            count += 6 * min(len(value), len(step.tokens) * shapes.config.num_experts_per_tok)
            continue
        tensors = list(tensors_of(name, value))
        constants += sum(tensor.nbytes for _, tensor in tensors)
        count += len(tensors)
    slack = _SLACK * (_STORAGES + count)
    return Estimate(shapes.call_bytes(site, step, cache) + slack, constants)
