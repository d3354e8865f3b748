"""DeepSeek-V4, in call order. This is the file to read first.

Axes, used in shape comments (checkpoint word, then letter):

    batch of sequences        b      residual streams (hyper-connections)  hc  (4)
    tokens of all sequences   n      model width                           d   (hidden_size)
    heads                     h      head width                            hd  (512, last rd = 64 roped)
    query rank                qr     output groups, rank                   g, or
    routed experts            e      experts of a token                    k
    indexer heads, width      ih, id compressed entries                    T   (one per ratio tokens)
    vocabulary                v

A layer is: hc_pre -> norm -> attention -> hc_post, then hc_pre -> norm -> experts -> hc_post.
Attention layers come in three kinds, by `compress_ratios`: 0 sees the last 128 tokens only (SWA);
4 adds the entries an indexer selects (CSA); 128 adds all entries (HCA).

Every step of the computation is a *site*: `self.wq_a(u)` runs the op of site `L3/attn/wq_a` on the
implementation its route names. Nothing here knows about devices, kernels or debugging.
Formulas follow inference/model.py of DeepSeek's release, called "the release" in the ops; numerics are
`plain`: its simulated quantisation of activations and KV is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cache import Cache, CompressorState, LayerCache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import CSA_RATIO, Config
from dsv4_bench.engine.ops.rope import rope_frequencies
from dsv4_bench.engine.registry import Context, RouteEntry, Site, apply_route, spec_of
from dsv4_bench.engine.step import Step


class Builder:
    """Makes sites below `path`, with weights from below `prefix` in the checkpoint."""

    def __init__(self, model: Transformer, path: str, prefix: str, layer: int | None) -> None:
        self.model = model
        self.config = model.config
        self.checkpoint = model.checkpoint
        self.path = path
        self.prefix = prefix
        self.layer = layer

    def below(self, path: str, prefix: str) -> Builder:
        return Builder(self.model, f"{self.path}{path}/", f"{self.prefix}{prefix}.", self.layer)

    def site(self, path: str, op: str, **params: Any) -> Site:
        site = Site(self.path + path, spec_of(op), params, self.layer)
        self.model.sites[site.path] = site
        return site

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self.prefix + name).to(self.model.device)

    def linear(
        self, path: str, name: str | None = None, out_dtype: torch.dtype | None = None
    ) -> Site:
        weight = self.checkpoint.weight(self.prefix + (name or path)).to(self.model.device)
        return self.site(path, "linear", weight=weight, out_dtype=out_dtype)

    def norm(self, path: str, name: str | None) -> Site:
        weight = self.tensor(f"{name}.weight") if name else None
        return self.site(path, "rms_norm", weight=weight, eps=self.config.rms_norm_eps)

    def rope(self, path: str, inverse: bool = False) -> Site:
        assert self.layer is not None
        freqs = rope_frequencies(self.config, self.layer).to(self.model.device)
        return self.site(path, "rope", freqs=freqs, inverse=inverse)

    def hyper(self, path: str, name: str) -> Site:
        config = self.config
        return self.site(
            path,
            "hc_pre",
            fn=self.tensor(f"{name}_fn"),
            scale=self.tensor(f"{name}_scale"),
            base=self.tensor(f"{name}_base"),
            iters=config.hc_sinkhorn_iters,
            eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )


class Compressor:
    """Turns every 4 (overlapping) or 128 tokens into one roped entry, all in float32 up to the norm."""

    def __init__(self, build: Builder) -> None:
        assert build.layer is not None
        self.ratio = build.config.ratio(build.layer)
        self.wkv = build.linear("wkv", out_dtype=torch.float32)  # [2d or d, D]
        self.wgate = build.linear("wgate", out_dtype=torch.float32)
        self.pool = build.site("pool", "compressor", ape=build.tensor("ape"))
        self.norm = build.norm("norm", "norm")
        self.rope = build.rope("rope")
        self.write = build.site("write", "cache_write")

    def __call__(self, u: Tensor, state: CompressorState, entries: Tensor, step: Step) -> None:
        kv, score = self.wkv(u), self.wgate(u)  # [n, w] float32
        pooled = self.pool(kv, score, state.kv, state.score, step)  # [m, width], m windows closed
        if len(pooled):
            positions, rows = step.new_entries(self.ratio, entries.shape[1])
            # An entry stands at the position of the first token of its window.
            new = self.rope(self.norm(pooled.to(u.dtype)), positions)
            self.write(new, rows, entries.flatten(0, 1))


class Indexer:
    """Scores the entries with its own small compressor and queries, keeps index_topk a token."""

    def __init__(self, build: Builder) -> None:
        config = build.config
        self.head_dim = config.index_head_dim
        self.compressor = Compressor(build.below("compressor", "compressor"))
        self.wq_b = build.linear("wq_b")  # [ih*id, qr]
        self.rope = build.rope("rope")
        self.weights_proj = build.linear("weights_proj")  # [ih, d]
        self.score = build.site("score", "index_score", scale=config.index_scale, ratio=CSA_RATIO)
        self.topk = build.site("topk", "index_topk", k=config.index_topk)

    def __call__(self, u: Tensor, qr: Tensor, cache: LayerCache, step: Step) -> Tensor:
        assert cache.index_state is not None and cache.index_entries is not None
        self.compressor(u, cache.index_state, cache.index_entries, step)
        q = self.rope(
            self.wq_b(qr).unflatten(-1, (-1, self.head_dim)), step.positions
        )  # [n, ih, id]
        weights = self.weights_proj(u)  # [n, ih]
        score = self.score(q, cache.index_entries, weights, step)  # [n, T]
        return self.topk(score, step.visible(CSA_RATIO))  # [n, min(topk, T)]


class Attention:
    """Multi-query attention with one shared K = V vector, over the window and compressed entries."""

    def __init__(self, build: Builder) -> None:
        config = build.config
        assert build.layer is not None
        self.ratio = config.ratio(build.layer)
        self.head_dim = config.head_dim
        self.wq_a = build.linear("wq_a")  # [qr, d]
        self.q_norm = build.norm("q_norm", "q_norm")
        self.wq_b = build.linear("wq_b")  # [h*hd, qr]
        self.q_head_norm = build.norm("q_head_norm", None)
        self.q_rope = build.rope("q_rope")
        self.wkv = build.linear("wkv")  # [hd, d]
        self.kv_norm = build.norm("kv_norm", "kv_norm")
        self.kv_rope = build.rope("kv_rope")
        if self.ratio:
            self.compressor = Compressor(build.below("compressor", "compressor"))
        if self.ratio == CSA_RATIO:
            self.indexer = Indexer(build.below("index", "indexer"))
        self.gather_swa = build.site("gather_swa", "gather_swa")
        self.window_write = build.site("window_write", "cache_write")
        self.core = build.site(
            "core", "attention", sink=build.tensor("attn_sink"), scale=config.softmax_scale
        )
        self.o_rope = build.rope("o_rope", inverse=True)
        wo_a = build.checkpoint.weight(f"{build.prefix}wo_a").to(build.model.device)
        self.wo_a = build.site("wo_a", "grouped_linear", weight=wo_a, groups=config.o_groups)
        self.wo_b = build.linear("wo_b")  # [d, g*or]

    def __call__(self, u: Tensor, cache: LayerCache, step: Step) -> Tensor:
        qr = self.q_norm(self.wq_a(u))  # [n, qr]
        q = self.q_head_norm(self.wq_b(qr).unflatten(-1, (-1, self.head_dim)))  # [n, h, hd]
        q = self.q_rope(q, step.positions)
        kv = self.kv_rope(self.kv_norm(self.wkv(u)), step.positions)  # [n, hd]

        entries = entry_index = None
        if self.ratio:
            assert cache.state is not None and cache.entries is not None
            self.compressor(u, cache.state, cache.entries, step)
            capacity = cache.entries.shape[1]
            if self.ratio == CSA_RATIO:
                selected = self.indexer(u, qr, cache, step)  # [n, topk] local entries
                entry_index = step.pool_rows(selected, capacity)
            else:
                entry_index = step.all_rows(self.ratio, capacity)  # [n, T]
            entries = cache.entries.flatten(0, 1)  # [b*capacity, hd]

        if step.is_decode:  # the new token overwrites the one that leaves the window
            self.window_write(kv, step.ring_slots, cache.ring)
            window, window_index = cache.ring, step.ring_rows
        else:  # a chunk's first tokens still need what its last ones overwrite
            window, window_index = self.gather_swa(cache.ring, kv), step.window_rows
            self.window_write(kv, step.ring_slots, cache.ring)

        o, _ = self.core(q, window, window_index, entries, entry_index)  # [n, h, hd]
        o = self.o_rope(o, step.positions)  # K = V, so the values carry their rotation
        return self.wo_b(self.wo_a(o.flatten(1)))  # [n, d]


class MoE:
    """Routed experts plus one shared expert."""

    def __init__(self, build: Builder) -> None:
        config, checkpoint, layer = build.config, build.checkpoint, build.layer
        assert layer is not None
        hashed = config.is_hash_layer(layer)
        self.gate = build.site(
            "gate",
            "gate",
            weight=checkpoint.weight(f"{build.prefix}gate").to(build.model.device),
            bias=None if hashed else build.tensor("gate.bias"),
            tid2eid=build.tensor("gate.tid2eid") if hashed else None,
            k=config.num_experts_per_tok,
            scale=config.routed_scaling_factor,
        )
        limit, device = config.swiglu_limit, build.model.device
        bank = checkpoint.experts(layer, device)
        self.experts = build.site("experts", "experts", bank=bank, limit=limit)
        shared = checkpoint.shared_expert(layer, device)
        self.shared = build.site("shared", "shared_expert", expert=shared, limit=limit)
        self.sum = build.site("sum", "moe_sum", dtype=build.model.dtype)

    def __call__(self, u: Tensor, tokens: Tensor) -> Tensor:
        routing, experts, _ = self.gate(u, tokens)  # [n, k]
        return self.sum(self.experts(u, routing, experts), self.shared(u))  # [n, d]


class Layer:
    """Two sublayers on the residual streams x [n, hc, d]."""

    def __init__(self, build: Builder) -> None:
        attn, ffn = build.below("attn", "attn"), build.below("ffn", "ffn")
        self.attn_hc_pre = build.hyper("attn/hc_pre", "hc_attn")
        self.attn_norm = build.norm("attn/norm", "attn_norm")
        self.attn = Attention(attn)
        self.attn_hc_post = build.site("attn/hc_post", "hc_post")
        self.ffn_hc_pre = build.hyper("ffn/hc_pre", "hc_ffn")
        self.ffn_norm = build.norm("ffn/norm", "ffn_norm")
        self.ffn = MoE(ffn)
        self.ffn_hc_post = build.site("ffn/hc_post", "hc_post")

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        u, post, comb = self.attn_hc_pre(x)  # [n, d], [n, hc], [n, hc, hc]
        y = self.attn(self.attn_norm(u), cache, step)
        x = self.attn_hc_post(y, x, post, comb)  # [n, hc, d]
        u, post, comb = self.ffn_hc_pre(x)
        y = self.ffn(self.ffn_norm(u), step.tokens)
        return self.ffn_hc_post(y, x, post, comb)


class Head:
    """Collapse the streams, norm, logits in float32."""

    def __init__(self, build: Builder) -> None:
        config = build.config
        self.hc_head = build.site(
            "hc_head",
            "hc_head",
            fn=build.tensor("hc_head_fn"),
            scale=build.tensor("hc_head_scale"),
            base=build.tensor("hc_head_base"),
            eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        self.norm = build.norm("norm", "norm")
        self.logits = build.linear("logits", "head", out_dtype=torch.float32)  # [v, d]

    def __call__(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(self.hc_head(x)))  # [n, v] float32


class Transformer:
    """The whole model. `sites` lists every op of the forward pass by path, in order of first use."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: str = "dtype",
    ) -> None:
        self.checkpoint = checkpoint
        self.config: Config = checkpoint.config
        self.dtype = dtype
        self.device = torch.device(device)
        self.kv = kv  # how a cache holds keys, one of cache.KV_FORMATS
        self.route: list[RouteEntry] = []
        self.sites: dict[str, Site] = {}
        root = Builder(self, "", "", None)
        embed_weight = checkpoint.weight("embed").to(self.device)
        self.embed = root.site(
            "embed", "embed", weight=embed_weight, hc=self.config.hc_mult, dtype=dtype
        )
        self.layers = [
            Layer(Builder(self, f"L{i}/", f"layers.{i}.", i))
            for i in range(self.config.num_hidden_layers)
        ]
        self.head = Head(Builder(self, "head/", "", None))

    @property
    def context(self) -> Context:
        return Context(self.device.type, self.dtype, self.kv)

    def set_route(self, entries: list[RouteEntry]) -> None:
        """Use `entries` from now on; raises, changing nothing, if one of them cannot be served."""
        apply_route(self.sites.values(), entries, self.context)
        self.route = list(entries)

    def new_cache(self, batch: int = 1) -> Cache:
        return Cache(self.config, batch, self.dtype, self.device, self.kv)

    def schedule(self, step: Step) -> list[str]:
        """The paths of the sites that `step` runs, in order."""
        return [path for path, site in self.sites.items() if self._runs(site, step)]

    def _runs(self, site: Site, step: Step) -> bool:
        if site.op == "gather_swa":
            return not step.is_decode
        if "/compressor/" in site.path and site.path.endswith(("/norm", "/rope", "/write")):
            assert site.layer is not None
            ratio = self.config.ratio(site.layer)
            return any(
                step.entries_of(b, ratio) > start // ratio for b, start in enumerate(step.starts)
            )
        return True

    @torch.inference_mode()
    def forward(self, step: Step, cache: Cache, last_only: bool = False) -> Tensor:
        """Append `step`'s tokens to `cache`; logits [n, v] float32, or [b, v] of the last tokens."""
        x = self.embed(step.tokens)  # [n, hc, d]
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, layer_cache, step)
        cache.advance(step)
        return self.head(self.last_rows(x, step) if last_only else x)

    @staticmethod
    def last_rows(x: Tensor, step: Step) -> Tensor:
        """The rows of each sequence's last token: [n, ...] -> [b, ...]."""
        return x[torch.tensor([rows.stop - 1 for rows in step.rows()], device=x.device)]
