"""What others compute instead of our kernels, at the same shapes: peers for bench_cuda.py.

`peers_of`: torch's own kernels and the modules of transformers' modeling_deepseek_v4, eager and under
torch.compile, on our arguments. Results are not compared here: tests/test_oracle.py holds the engine to
transformers. `attach`: kernels of serving engines, where they are installed or built (docs/peers.md), on
arguments of their own formats; the first call of each is compared with float32 before it is timed.

    python tests/bench_peers.py [GLOB ...]        these peers alone, checked and timed
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from types import SimpleNamespace
from typing import Any

import peer_deepgemm
import peer_flashinfer
import peer_flashmla
import peer_humming
import peer_marlin
import peer_sglang
import torch
from bench_cuda import COMPILED, Call, Case, cases, time_calls
from peer_library import CUDA, Peer, missing
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


# ------------------------------------------------------------------------------ built peers

ERRORS: dict[str, float] = {}  # "peer: case" -> relative error of the first call


def routed(n: str, random: str | None, turn: int) -> Tensor:
    import bench_cuda_experts as table

    route = table.at_random if random else table.balanced
    return route(int(n), turn)


def pools(n: str, heads: str, window: str, extra: str) -> Peer:
    import bench_cuda_attention as table

    rows = tuple(len(pool) for pool in table.pools())
    return peer_flashmla.decode(int(n), int(heads), (int(window), int(extra)), rows)


NVFP4_EXPERTS = r"experts nvfp4 (\d+) tokens( at random)?,.*"
NVFP4_DENSE = r"linear nvfp4 (\d+)x(\d+) m(\d+)"
# Fewer: each of its kernels takes seconds to build.
HUMMING_DENSE = r"linear nvfp4 (\d+)x(\d+) m(1)"
HUMMING_EXPERTS = r"experts nvfp4 (1|8|64|1024|4096) tokens(),.*"
# (library, or None for a Python package; label; pattern of the case's name; its groups -> peer)
BUILT: list[tuple[str | None, str, str, Callable[..., Peer]]] = [
    ("flashmla", "FlashMLA fp8", r"attention (\d+)x(64|128) (\d+)\+(\d+)", lambda _, *a: pools(*a)),
    (
        "flashmla",
        "FlashMLA",
        r"attention (\d+)x(64) 128\+512 of (\d+)",
        lambda _, n, heads, rows: peer_flashmla.prefill(int(n), int(heads), 640, int(rows)),
    ),
    (
        "marlin",
        "Marlin",
        NVFP4_DENSE,
        lambda turn, n, k, m: peer_marlin.dense(int(n), int(k), int(m), turn),
    ),
    (
        "marlin",
        "Marlin, products only",
        NVFP4_EXPERTS,
        lambda turn, n, random: peer_marlin.experts(4096, 2048, routed(n, random, turn), 256),
    ),
    (
        None,
        "Humming",
        HUMMING_DENSE,
        lambda turn, n, k, m: peer_humming.dense(int(n), int(k), int(m), turn),
    ),
    (
        None,
        "Humming, products only",
        HUMMING_EXPERTS,
        lambda turn, n, random: peer_humming.experts(4096, 2048, routed(n, random, turn), 256),
    ),
    (
        "deepgemm",
        "DeepGEMM fp8",
        r"index_score (\d+) of (\d+)",
        lambda _, batch, keys: peer_deepgemm.scores(int(batch), int(keys)),
    ),
    (
        "sglang",
        "SGLang",
        r"index_topk (\d+) of (\d+) (equal|random)",
        lambda _, n, total, kind: peer_sglang.select(int(n), int(total), kind == "equal"),
    ),
    (
        "sglang",
        "SGLang GEMV",
        r"linear bf16 (4096x8192|2048x4096|512x4096) m1",
        lambda _, shape: peer_sglang.gemv(*map(int, shape.split("x"))),
    ),
    (
        "flashinfer",
        "DeepGEMM + FlashInfer",
        r"hc_pre (\d+)x4x4096",
        lambda _, n: peer_flashinfer.pre(int(n)),
    ),
    (
        "flashinfer",
        "cuBLAS tf32 + FlashInfer",
        r"hc_pre (1|64)x4x4096",
        lambda _, n: peer_flashinfer.pre_cublas(int(n)),
    ),
    (
        "flashinfer",
        "FlashInfer",
        r"hc_post (\d+)x4x4096",
        lambda _, n: peer_flashinfer.post(int(n)),
    ),
]


def unavailable(library: str | None) -> str | None:
    """Why a row of BUILT cannot run here, or None."""
    if library is None:
        return None if peer_humming.installed() else "the package humming-kernels is not installed"
    return missing(library)


def maker_of(label: str, name: str, build: Callable[..., Peer], groups: tuple[str, ...]) -> Any:
    def make(turn: int) -> Call:
        call, check = build(turn, *groups)
        if turn == 0:
            call()
            call()  # a second time: nothing may be left from the first
            torch.cuda.synchronize()
            ERRORS[f"{label}: {name}"] = check()
        return call

    return make


def humming_products(found: Sequence[Case]) -> Iterator[peer_humming.Product]:
    for case in found:
        if match := re.fullmatch(HUMMING_DENSE, case.name):
            n, k, rows = map(int, match.groups())
            yield n, k, None, rows
        elif match := re.fullmatch(HUMMING_EXPERTS, case.name):
            pairs = 6 * int(match[1])
            yield 4096, 4096, 256, pairs
            yield 4096, 2048, 256, pairs


def attach(found: Sequence[Case], labels: str = "*") -> dict[str, str]:
    """Adds the peers of BUILT whose label matches the glob `labels` to the cases they can run.

    Returns those left out, with the reason.
    """
    left_out: dict[str, str] = {}
    wanted = [row for row in BUILT if fnmatch(row[1], labels)]
    for library, label, pattern, build in wanted:
        if reason := unavailable(library):
            left_out[label] = reason
            continue
        matched = False
        for case in found:
            if match := re.fullmatch(pattern, case.name):
                case.peers[label] = maker_of(label, case.name, build, match.groups())
                matched = True
        if not matched:
            left_out[label] = f"no case in this run is named {pattern}"
    if peer_humming.installed() and any(library is None for library, *_ in wanted):
        try:
            peer_humming.prepare(humming_products(found))
        except Exception as problem:  # each of its rows will say what fails
            print(f"Humming's kernels not built ahead: {problem}", file=sys.stderr)
    return left_out


def main(patterns: list[str]) -> int:
    found = cases(patterns)
    torch.zeros(1, device=CUDA)
    for case in found:
        case.peers = {}
    for label, reason in attach(found).items():
        print(f"left out: {label}: {reason}")
    failed = 0
    for case in found:
        for label, make in case.peers.items():
            try:
                time, spread = time_calls([make(i) for i in range(case.count())])
                error = ERRORS[f"{label}: {case.name}"]
                print(
                    f"{case.name:<44} {label:<24} {time:9.2f} us  spread {spread:.3f}  error {error:.1e}"
                )
            except Exception as problem:
                failed += 1
                print(f"{case.name:<44} {label:<24} {type(problem).__name__}: {problem}")
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
