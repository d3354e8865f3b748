"""The training forward: the same function as DeepseekV4ForCausalLM on the same parameters, faster.

transformers' forward materialises attention over all pairs of tokens and launches thousands of
small kernels. Here the window is computed in blocks of 128 queries, the experts as two dense
products, Sinkhorn as one kernel, and the rest is left to torch.compile. It takes the parameters of
a transformers model; `train.py --check` compares the logits of the two.

Beyond transformers' forward it gives, for every CSA layer, the loss that teaches the indexer: the
cross-entropy between its scores and the attention the heads pay to the entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.config import CSA_RATIO, Config
from dsv4_bench.engine.demo_model.sinkhorn import sinkhorn

WINDOW = 128  # of the model, and the block of queries
HIDDEN = -1e30  # a logit that no exponential sees
Params = dict[str, Tensor]


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, result in x's dtype."""
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 64 of x [..., w] in pairs; cos, sin [..., 32] broadcast."""
    width = 2 * cos.shape[-1]
    keep, turn = x[..., :-width], x[..., -width:].float().unflatten(-1, (-1, 2))
    a, b = turn[..., 0], turn[..., 1]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((keep, turned.to(x.dtype)), -1)


def hyper(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    """x [b, s, 4, d] -> input u [b, s, d], post [b, s, 4], logits of the mixing [b, s, 4, 4]."""
    flat = x.flatten(2)
    rho = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    mixes = F.linear(flat, fn) * rho
    pre = torch.sigmoid(mixes[..., :4] * scale[0] + base[:4]) + eps
    post = 2 * torch.sigmoid(mixes[..., 4:8] * scale[1] + base[4:8])
    comb = (mixes[..., 8:] * scale[2] + base[8:]).unflatten(-1, (4, 4))
    return (pre.unsqueeze(-1) * x).sum(2), post, comb


def expand(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a sublayer whose output is y [b, s, d]."""
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return post.unsqueeze(-1) * y.float().unsqueeze(2) + mixed


def compress(u: Tensor, p: Params, name: str, ratio: int, cos: Tensor, sin: Tensor) -> Tensor:
    """u [b, s, d] -> roped entries [b, s/ratio, width]."""
    b, s, _ = u.shape
    kv = mm(u, p[f"{name}.kv_proj.weight"]).view(b, s // ratio, ratio, -1)
    gate = mm(u, p[f"{name}.gate_proj.weight"]).view(b, s // ratio, ratio, -1).float()
    gate = gate + p[f"{name}.position_bias"]
    if ratio == CSA_RATIO:  # the first half of the window before, the second half of this one
        width = kv.shape[-1] // 2
        kv_a, gate_a = kv[:, :-1, :, :width], gate[:, :-1, :, :width]
        kv_a = F.pad(kv_a, (0, 0, 0, 0, 1, 0))
        gate_a = F.pad(gate_a, (0, 0, 0, 0, 1, 0), value=HIDDEN)
        kv = torch.cat((kv_a, kv[..., width:]), 2)
        gate = torch.cat((gate_a, gate[..., width:]), 2)
    pooled = (gate.softmax(2) * kv.float()).sum(2).to(u.dtype)
    pooled = rms(pooled, p[f"{name}.kv_norm.weight"], 1e-6)
    count = pooled.shape[1]
    return rope(pooled, cos[: count * ratio : ratio], sin[: count * ratio : ratio])


def index_scores(u: Tensor, qr: Tensor, p: Params, cos: Tensor, sin: Tensor) -> Tensor:
    """The indexer's score of every entry for every token: [b, s, T] float32."""
    b, s, _ = u.shape
    name = "self_attn.compressor.indexer"
    keys = compress(u, p, name, CSA_RATIO, cos, sin)  # [b, T, id]
    width = keys.shape[-1]
    q = mm(qr, p[f"{name}.q_b_proj.weight"]).view(b, s, -1, width)
    q = rope(q, cos[:, None], sin[:, None])
    heads = q.shape[2]
    dots = (q.reshape(b, s * heads, width) @ keys.transpose(1, 2)).view(b, s, heads, -1)
    weights = mm(u, p[f"{name}.scorer.weights_proj.weight"]).float() * (heads * width) ** -0.5
    return (torch.relu(dots).float() * weights.unsqueeze(-1)).sum(2)


def indexer_loss(teacher: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """[2]: mean cross-entropy of the scores to the heads' attention over the entries, and how much
    of that attention goes to the chosen ones. teacher, scores, chosen [b, s, T]."""
    mass = teacher.sum() + 1.0
    loss = -(teacher * scores.log_softmax(-1)).sum() / mass
    return torch.stack((loss, ((teacher * chosen).sum() / mass).detach()))


def project(
    u: Tensor, p: Params, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed input -> query latent [b, s, qr], queries [b, s, h, hd], window keys [b, s, hd]."""
    b, s, _ = u.shape
    qr = rms(mm(u, p["self_attn.q_a_proj.weight"]), p["self_attn.q_a_norm.weight"], 1e-6)
    q = mm(qr, p["self_attn.q_b_proj.weight"]).view(b, s, heads, -1).float()
    q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    q = rope(q.to(u.dtype), cos[:, None], sin[:, None])
    kv = rms(mm(u, p["self_attn.kv_proj.weight"]), p["self_attn.kv_norm.weight"], 1e-6)
    return qr, q, rope(kv, cos, sin)


def window_logits(q: Tensor, kv: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b, s, h, 256] of each token for its own block of 128 and the one before, hidden
    where outside the last windows[b] tokens (at most 128); and those keys [b, s/128, 256, hd]."""
    b, s, heads, width = q.shape
    blocks = s // WINDOW
    keys = kv.view(b, blocks, WINDOW, width)
    keys = torch.cat((F.pad(keys[:, :-1], (0, 0, 0, 0, 1, 0)), keys), 2)
    logits = q.reshape(b, blocks, WINDOW * heads, width) @ keys.transpose(2, 3)
    logits = logits.view(b, blocks, WINDOW, heads, 2 * WINDOW).float()
    row = torch.arange(WINDOW, device=q.device)[:, None] + WINDOW
    column = torch.arange(2 * WINDOW, device=q.device)
    seen = (column <= row) & (column > row - windows[:, None, None])  # [b, 128, 256]
    first = torch.arange(blocks, device=q.device)[:, None, None] > 0
    seen = seen[:, None] & (first | (column >= WINDOW))  # [b, n, 128, 256]
    logits = torch.where(seen[:, :, :, None], logits * width**-0.5, HIDDEN)
    return logits.view(b, s, heads, -1), keys


def entry_logits(q: Tensor, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Logits [b, s, h, T], hidden where an entry is not complete yet; which are [s, T]."""
    b, s, heads, width = q.shape
    count = entries.shape[1]
    logits = q.reshape(b, s * heads, width) @ entries.transpose(1, 2)
    ends = (torch.arange(s, device=q.device) + 1) // ratio
    visible = torch.arange(count, device=q.device) < ends[:, None]
    logits = logits.view(b, s, heads, count).float() * width**-0.5
    return torch.where(visible[None, :, None], logits, HIDDEN), visible


def choose(scores: Tensor, visible: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The scores, hidden where not visible, and which entries they choose; topk 0: all visible."""
    scores = torch.where(visible, scores, HIDDEN)
    chosen = visible.expand(scores.shape)
    if topk:
        edge = scores.detach().topk(min(topk, scores.shape[-1]), -1).values[..., -1:]
        chosen = chosen & (scores.detach() >= edge)
    return scores, chosen


def attend(
    x: Tensor,
    u: Tensor,
    post: Tensor,
    comb: Tensor,
    p: Params,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    groups: int,
    ratio: int,
    topk: int,
    windows: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The attention sublayer, from its collapsed input u; topk 0: all visible entries are used."""
    b, s, _ = u.shape
    u = rms(u, p["input_layernorm.weight"], 1e-6).to(dtype)
    qr, q, kv = project(u, p, cos, sin, heads)
    width = q.shape[-1]
    lw, keys = window_logits(q, kv, windows)
    sink = p["self_attn.sinks"]
    m = torch.maximum(lw.amax(-1), sink)
    stats = u.new_zeros(2, dtype=torch.float32)
    oe = torch.zeros((), dtype=dtype, device=u.device)
    if ratio:
        entries = compress(u, p, "self_attn.compressor", ratio, cos, sin)  # [b, T, hd]
        le, visible = entry_logits(q, entries, ratio)
        m = torch.maximum(m, le.amax(-1))
    m = m.detach().unsqueeze(-1)
    pw = torch.exp(lw - m)
    total = pw.sum(-1, keepdim=True) + torch.exp(sink[:, None] - m)
    if ratio:
        pe = torch.exp(le - m)
        if ratio == CSA_RATIO:
            teacher = (pe / (total + pe.sum(-1, keepdim=True))).sum(2).detach()
            scores = index_scores(u.detach(), qr.detach(), p, cos, sin)
            scores, chosen = choose(scores, visible, topk)
            stats = indexer_loss(teacher, scores, chosen)
            pe = pe * chosen.unsqueeze(2)
        total = total + pe.sum(-1, keepdim=True)
        oe = (pe.to(dtype).reshape(b, s * heads, -1) @ entries).view(b, s, heads, width)
    ow = pw.to(dtype).view(b, s // WINDOW, WINDOW * heads, -1) @ keys
    o = ((ow.view(b, s, heads, width).float() + oe.float()) / total).to(dtype)
    o = rope(o, cos[:, None], -sin[:, None]).reshape(b, s, groups, -1)
    w = p["self_attn.o_a_proj.weight"].to(dtype).view(groups, -1, heads // groups * width)
    z = torch.einsum("bsgk,gnk->bsgn", o, w).flatten(2)
    return expand(mm(z, p["self_attn.o_b_proj.weight"]), x, post, comb), stats


def experts(
    x: Tensor,
    u: Tensor,
    post: Tensor,
    comb: Tensor,
    p: Params,
    table: Tensor | None,
    ids: Tensor,
    k: int,
    factor: float,
    limit: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The expert sublayer, every expert on every token; returns the streams and tokens an expert."""
    b, s, d = u.shape
    v = rms(u, p["post_attention_layernorm.weight"], 1e-6).view(b * s, d)
    scores = F.softplus(F.linear(v, p["mlp.gate.weight"])).sqrt()
    if table is not None:
        chosen = table[ids.view(-1)]
    else:
        chosen = (scores + p["mlp.gate.e_score_correction_bias"]).detach().topk(k, -1).indices
    picked = scores.gather(1, chosen)
    picked = picked / (picked.sum(-1, keepdim=True) + 1e-20) * factor
    routing = torch.zeros_like(scores).scatter(1, chosen, picked)  # [n, e]
    v = v.to(dtype)
    up_w, down_w = p["mlp.experts.gate_up_proj"], p["mlp.experts.down_proj"]
    count, width = down_w.shape[0], down_w.shape[2]
    both = mm(v, up_w.reshape(-1, d)).view(-1, count, 2, width)
    hidden = F.silu(both[:, :, 0].clamp(max=limit)) * both[:, :, 1].clamp(-limit, limit)
    hidden = (hidden * routing.unsqueeze(-1)).to(dtype).reshape(-1, count * width)
    y = mm(hidden, down_w.transpose(0, 1).reshape(d, -1))
    gate = mm(v, p["mlp.shared_experts.gate_proj.weight"]).clamp(max=limit)
    up = mm(v, p["mlp.shared_experts.up_proj.weight"]).clamp(-limit, limit)
    y = y + mm(F.silu(gate) * up, p["mlp.shared_experts.down_proj.weight"])
    load = (routing > 0).sum(0).float().detach()
    return expand(y.view(b, s, d), x, post, comb), load


def finish(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, head: Tensor
) -> Tensor:
    """Streams -> logits [b, s, v] float32."""
    flat = x.flatten(2)
    rho = torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(F.linear(flat, fn) * rho * scale + base) + 1e-6
    return F.linear(rms((pre.unsqueeze(-1) * x).sum(2), norm, 1e-6), head)


@dataclass
class Output:
    """logits [b, s, v]; indexer loss and share of the attention it selects; tokens an expert."""

    logits: Tensor
    index_loss: Tensor
    captured: Tensor
    loads: list[Tensor] = field(default_factory=list)


class FastForward:
    """Runs a transformers model's parameters; `override` maps names to replacements (fake quant)."""

    def __init__(self, model: Any, config: Config, dtype: torch.dtype, compiled: bool) -> None:
        self.config, self.dtype = config, dtype
        self.params: Params = dict(model.named_parameters())
        self.buffers: Params = dict(model.named_buffers())
        self.device = self.params["lm_head.weight"].device
        rotary = model.model.rotary_emb
        self.freqs = (rotary.main_inv_freq.float(), rotary.compress_inv_freq.float())
        self._names: dict[int, list[str]] = {}
        self.angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self.hyper, self.attend = ready(hyper), ready(attend)
        self.experts, self.finish = ready(experts), ready(finish)

    def _rotation(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        key = (min(1, self.config.ratio(layer)), length)
        if key not in self.angles:
            freqs = self.freqs[key[0]]
            angle = torch.arange(length, device=self.device)[:, None].float() * freqs
            self.angles[key] = (angle.cos(), angle.sin())
        return self.angles[key]

    def _layer(self, layer: int, override: Params) -> Params:
        prefix = f"model.layers.{layer}."
        if layer not in self._names:
            known = [*self.params, *self.buffers]
            self._names[layer] = [n for n in known if n.startswith(prefix) and "rotary" not in n]
        found = {}
        for name in self._names[layer]:
            value = override.get(name, self.params.get(name))
            found[name.removeprefix(prefix)] = self.buffers[name] if value is None else value
        return found

    def __call__(
        self,
        ids: Tensor,
        topk: int,
        override: Params | None = None,
        windows: Tensor | None = None,
    ) -> Output:
        """ids [b, s], s a multiple of 128; topk 0 lets every token see every entry.

        windows [b], at most 128 each (128 if None): beyond them a sequence sees entries only.
        """
        c, override = self.config, override or {}
        if windows is None:
            windows = torch.full((len(ids),), WINDOW, device=ids.device)
        eps, dtype = c.hc_eps, self.dtype
        x = F.embedding(ids, self.params["model.embed_tokens.weight"])
        x = x.unsqueeze(2).expand(-1, -1, 4, -1).contiguous().float()
        out = Output(x, x.new_zeros(()), x.new_zeros(()))
        csa = 0
        for layer in range(c.num_hidden_layers):
            p = self._layer(layer, override)
            cos, sin = self._rotation(layer, ids.shape[1])
            u, post, comb = self.hyper(
                x, p["attn_hc.fn"], p["attn_hc.base"], p["attn_hc.scale"], eps
            )
            comb = sinkhorn(comb, c.hc_sinkhorn_iters, eps)
            ratio, heads = c.ratio(layer), c.num_attention_heads
            attn = {n: v for n, v in p.items() if n.startswith(("self_attn", "input"))}
            x, stats = self.attend(
                x, u, post, comb, attn, cos, sin, heads, c.o_groups, ratio,
                topk if ratio == CSA_RATIO else 0, windows, dtype,
            )  # fmt: skip
            if ratio == CSA_RATIO:
                csa += 1
                out.index_loss, out.captured = out.index_loss + stats[0], out.captured + stats[1]
            u, post, comb = self.hyper(x, p["ffn_hc.fn"], p["ffn_hc.base"], p["ffn_hc.scale"], eps)
            comb = sinkhorn(comb, c.hc_sinkhorn_iters, eps)
            table = p.get("mlp.gate.tid2eid")
            mlp = {
                n: v for n, v in p.items() if n.startswith(("mlp", "post")) and "tid2eid" not in n
            }
            x, load = self.experts(
                x, u, post, comb, mlp, table, ids, c.num_experts_per_tok,
                c.routed_scaling_factor, c.swiglu_limit, dtype,
            )  # fmt: skip
            out.loads.append(load)
        out.captured = out.captured / max(1, csa)
        names = ("hc_head.hc_fn", "hc_head.hc_base", "hc_head.hc_scale", "norm.weight")
        tail = [self.params[f"model.{name}"] for name in names]
        out.logits = self.finish(x, *tail, self.params["lm_head.weight"])
        return out
