"""What others compute instead of our kernels, on the same arguments: peers for bench_cuda.py.

torch's own kernels, and the modules of transformers' modeling_deepseek_v4, eager and under torch.compile.
Results are not compared here: tests/test_oracle.py holds the engine to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from bench_cuda import COMPILED, Call
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Builder = Callable[[tuple[Any, ...], dict[str, Any]], Call]


def peers_of(op: str, arguments: Callable[[], Arguments]) -> dict[str, Callable[[int], Call]]:
    """The peers of `op`, each on `arguments()` of its own."""

    def maker(build: Builder) -> Callable[[int], Call]:
        return lambda _: build(*arguments())

    return {name: maker(build) for name, build in PEERS.get(op, {}).items()}


def transformers_module(name: str, **config: Any) -> torch.nn.Module:
    """A module of transformers' DeepSeek-V4 on the GPU, its parameters not set."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    with torch.device("cuda"):
        module = getattr(modeling_deepseek_v4, name)(SimpleNamespace(**config))
    return module.requires_grad_(False)


# ------------------------------------------------------------------------------ hyper-connections


@cache
def hyper_module(d: int, iters: int, eps: float, norm_eps: float) -> torch.nn.Module:
    return transformers_module(
        "DeepseekV4HyperConnection",
        hc_mult=4,
        hc_sinkhorn_iters=iters,
        hc_eps=eps,
        rms_norm_eps=norm_eps,
        hidden_size=d,
    )


def call_hyper(module: torch.nn.Module, weights: dict[str, Tensor], x: Tensor) -> Any:
    return torch.func.functional_call(module, weights, (x,))


def mix(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As DeepseekV4DecoderLayer.forward does it."""
    mixed = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
    return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + mixed


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def hc_pre(run: Callable[..., Any], args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    (x,) = args
    module = hyper_module(x.shape[-1], params["iters"], params["eps"], params["norm_eps"])
    weights = {name: params[name] for name in ("fn", "base", "scale")}
    return lambda: run(module, weights, x[None])


# ------------------------------------------------------------------------------ other ops


def gate(args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    x, weight = args[0], params["weight"].data
    router = transformers_module(
        "DeepseekV4TopKRouter",
        num_experts_per_tok=params["k"],
        num_local_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=params["scale"],
    )
    router.weight.data, router.e_score_correction_bias = weight, params["bias"]
    return lambda: router(x)


def rope(args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    x, positions = args
    angle = positions[:, None] * params["freqs"]
    cos, sin = angle.cos(), angle.sin()
    return lambda: apply_rotary_pos_emb(x, cos, sin)


def rms_norm(args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    (x,), gain = args, params["weight"]
    return lambda: torch.nn.functional.rms_norm(x, (x.shape[-1],), gain, params["eps"])


def index_score(args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    """One query a sequence, as DeepseekV4IndexerScorer but in bfloat16 until the sum."""
    q, keys, weights = args[:3]

    def run() -> Tensor:
        scores = torch.bmm(q, keys.transpose(1, 2)).relu_()
        return torch.bmm(weights[:, None], scores)

    return run


def index_topk(args: tuple[Any, ...], params: dict[str, Any]) -> Call:
    return lambda: torch.topk(args[0], params["k"], sorted=False)


PEERS: dict[str, dict[str, Builder]] = {
    "hc_pre": {
        "transformers": lambda args, params: hc_pre(call_hyper, args, params),
        f"transformers {COMPILED}": lambda args, params: hc_pre(compiled(call_hyper), args, params),
    },
    "hc_post": {
        "transformers": lambda args, params: lambda: mix(*args),
        f"transformers {COMPILED}": lambda args, params: lambda: compiled(mix)(*args),
    },
    "gate": {"transformers": gate},
    "rope": {"transformers": rope},
    "rms_norm": {"torch": rms_norm},
    "index_score": {"torch bmm": index_score},
    "index_topk": {"torch.topk": index_topk},
}
