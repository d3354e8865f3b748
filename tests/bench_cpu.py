"""Times of the CPU kernels: `make bench`, or ``python tests/bench_cpu.py [--json FILE]``.

Everything in one run, on two threads: what memory gives to a plain read loop, then NVFP4 matrix
times vector against it, against torch's bfloat16 product and against dequantising first, then
sparse attention and every op of a V4-Flash layer against the reference. Weights are cold: each
call takes another matrix of a set several times larger than the last-level cache. The variants of
one comparison take turns, so that a disturbance hits all of them; shown are the median and the
10th to 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsv4_bench.engine.cpu as cpu
from dsv4_bench.engine import cpu_library
from dsv4_bench.engine.config import FLASH
from dsv4_bench.engine.formats import DENSE_CACHE, Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS
from dsv4_bench.engine.step import Step

THREADS = 2
COLD_BYTES = 640 << 20  # of one set of matrices
TURN, REST = 5, 0.008  # calls in a row, seconds before them
Call = Callable[[], Any]


class Times:
    """Seconds of one variant."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]

    def to_dict(self) -> dict[str, float]:
        return {
            "median_s": self.median,
            "p10_s": self.percentile(0.1),
            "p90_s": self.percentile(0.9),
            "calls": len(self.seconds),
        }


def take_turns(variants: dict[str, Sequence[Call]], seconds: float) -> dict[str, Times]:
    """Time the variants in turn, a few calls of each, always the next ones; at least three rounds.

    Before its turn a variant rests until the other's threads have stopped spinning for more work,
    which OpenMP's do for milliseconds; its first call then wakes its own and is not counted.
    """
    times = {name: Times() for name in variants}
    next_call = dict.fromkeys(variants, 0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, calls in variants.items():
            time.sleep(REST)
            for counted in (False, *[True] * TURN):
                call = calls[next_call[name] % len(calls)]
                next_call[name] += 1
                start = time.perf_counter()
                call()
                if counted:
                    times[name].seconds.append(time.perf_counter() - start)
        rounds += 1
    return times


def copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def nvfp4(n: int, k: int) -> Weight:
    """Random codes and scales: the time does not depend on them."""
    scale = torch.randint(40, 100, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return Weight("w", "nvfp4", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), scale, 0.01)


def fp8(n: int, k: int) -> Weight:
    data = torch.randint(0, 120, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (-(-n // 128), -(-k // 128)), dtype=torch.uint8)
    return Weight("w", "fp8_block", data, scale.view(torch.float8_e8m0fnu))


def dense(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    return Weight("w", "dense", torch.randn(n, k).to(dtype))


def spread(times: Times) -> str:
    """Median and 10th to 90th percentile, microseconds."""
    low, high = times.percentile(0.1) * 1e6, times.percentile(0.9) * 1e6
    return f"{times.median * 1e6:.0f} ({low:.0f}-{high:.0f})"


# ------------------------------------------------------------------------------ the measurements


def bench_bandwidth(buffer: Tensor, seconds: float) -> tuple[float, Times]:
    """Bytes per second of a read loop, over pieces of the size of one matrix."""
    size = 4_718_592  # one [2048, 4096] NVFP4 matrix
    pieces = [buffer[i : i + size] for i in range(0, buffer.numel() - size + 1, size)]
    calls = [lambda piece=piece: cpu.read_bandwidth_pass(piece) for piece in pieces]
    times = take_turns({"read": calls}, seconds)["read"]
    return size / times.median, times


def bench_matvec(
    n: int, k: int, dtype: torch.dtype, buffer: Tensor, seconds: float
) -> dict[str, Any]:
    """NVFP4 matvec, torch's bfloat16 matvec and the read loop, taking turns."""
    weights = [nvfp4(n, k) for _ in range(copies(n * k * 9 // 16))]
    plain = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
    nbytes = weights[0].nbytes
    pieces = [buffer[i : i + nbytes] for i in range(0, buffer.numel() - nbytes + 1, nbytes)]
    x = torch.randn(1, k).to(dtype)
    x16 = x.bfloat16()
    times = take_turns(
        {
            "nvfp4": [lambda w=w: cpu.linear(x, weight=w, out_dtype=None) for w in weights],
            "read": [lambda piece=piece: cpu.read_bandwidth_pass(piece) for piece in pieces],
            "torch_bf16": [lambda w=w: x16 @ w.T for w in plain],
        },
        seconds,
    )
    slow = take_turns(
        {"dequantize": [lambda w=w: x.float() @ w.dequantize().T for w in weights[:5]]}, 0.0
    )
    times.update(slow)
    rate, read = nbytes / times["nvfp4"].median, nbytes / times["read"].median
    return {
        "shape": [n, k],
        "dtype": str(dtype).removeprefix("torch."),
        "times": times,
        "gb_per_s": rate / 1e9,
        "read_gb_per_s": read / 1e9,
        "share_of_read": rate / read,
        "vs_torch_bf16": times["torch_bf16"].median / times["nvfp4"].median,
        "vs_dequantize": times["dequantize"].median / times["nvfp4"].median,
    }


def attention_arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One token, 64 heads, 128 window rows and 512 of 4096 entries."""
    heads, dim = FLASH.num_attention_heads, FLASH.head_dim
    q = torch.randn(1, heads, dim).to(dtype)
    window, entries = torch.randn(128, dim).to(dtype), torch.randn(4096, dim).to(dtype)
    window_index = torch.arange(128, dtype=torch.int32)[None]
    entry_index = torch.randperm(4096)[None, :512].int()
    params = {"sink": torch.zeros(heads), "scale": dim**-0.5}
    return (q, window, window_index, entries, entry_index), params


def both(op: str, *args: Any, **params: Any) -> dict[str, Sequence[Call]]:
    reference, kernel = OPS[op].reference, IMPLEMENTATIONS[op]["cpu"].function
    return {
        "reference": [lambda: reference(*args, **params)],
        "cpu": [lambda: kernel(*args, **params)],
    }


def layer_ops(dtype: torch.dtype) -> dict[str, dict[str, Sequence[Call]]]:
    """The ops of a V4-Flash layer at one token, position 4000, with the released formats."""
    c = FLASH
    d, hd, heads, hc = c.hidden_size, c.head_dim, c.num_attention_heads, c.hc_mult
    inner, ih, width = c.moe_intermediate_size, c.index_n_heads, c.index_head_dim
    step = Step(torch.zeros(1, dtype=torch.int64), (4003,), (1,), c.sliding_window)
    u, x = torch.randn(1, d).to(dtype), torch.randn(1, hc, d).to(dtype)
    q = torch.randn(1, heads, hd).to(dtype)
    mixes = (2 + hc) * hc
    stream = {"base": torch.randn(mixes), "eps": 1e-6, "norm_eps": 1e-6}
    experts = [Expert(nvfp4(inner, d), nvfp4(d, inner), nvfp4(inner, d)) for _ in range(12)]
    ids = torch.randperm(12)[None, : c.num_experts_per_tok].int()
    state = [torch.zeros(1, 8, 2 * hd), torch.full((1, 8, 2 * hd), -torch.inf)]
    kv = torch.randn(1, 2 * hd)
    keys = torch.randn(1, 1024, width).to(dtype)
    score = torch.randn(1, 1001)
    freqs = torch.rand(c.qk_rope_head_dim // 2)
    gate = dense(c.n_routed_experts, d)
    groups, rank = c.o_groups, c.o_lora_rank
    per_group = heads * hd // groups
    attention, params = attention_arguments(dtype)
    ring, slots = torch.randn(128, hd).to(dtype), torch.tensor([5])
    linear = {"out_dtype": None}
    return {
        "hc_pre": both(
            "hc_pre", x, fn=torch.randn(mixes, hc * d), scale=torch.rand(3), iters=20, **stream
        ),
        "rms_norm (d)": both("rms_norm", u, weight=torch.rand(d), eps=1e-6),
        "linear wq_a fp8": both("linear", u, weight=fp8(c.q_lora_rank, d), **linear),
        "linear wq_b fp8": both(
            "linear", u[:, : c.q_lora_rank], weight=fp8(heads * hd, c.q_lora_rank), **linear
        ),
        "linear compressor bf16": both(
            "linear", u, weight=dense(2 * hd, d), out_dtype=torch.float32
        ),
        "rope (q)": both("rope", q, step.positions, freqs=freqs, inverse=False),
        "compressor": both("compressor", kv, kv, *state, step, ape=torch.randn(4, 2 * hd)),
        "index_score": both(
            "index_score",
            torch.randn(1, ih, width).to(dtype),
            keys,
            torch.randn(1, ih).to(dtype),
            step,
            scale=0.01,
            ratio=4,
        ),
        "index_topk": both("index_topk", score, torch.tensor([1001]), k=c.index_topk),
        "cache_write": both("cache_write", torch.randn(1, hd).to(dtype), slots, ring),
        "attention": both("attention", *attention, **params),
        "grouped_linear fp8": both(
            "grouped_linear", q.flatten(1), weight=fp8(groups * rank, per_group), groups=groups
        ),
        "gate": both(
            "gate",
            u,
            torch.zeros(1).long(),
            weight=gate,
            bias=torch.randn(c.n_routed_experts),
            tid2eid=None,
            k=c.num_experts_per_tok,
            scale=1.5,
        ),
        "experts nvfp4": both("experts", u, torch.rand(ids.shape), ids, bank=experts, limit=10.0),
        "shared_expert nvfp4": both("shared_expert", u, expert=experts[0], limit=10.0),
        "moe_sum": both("moe_sum", u.float(), u.float(), dtype=dtype),
        "hc_post": both("hc_post", u, x, torch.rand(1, hc), torch.rand(1, hc, hc)),
    }


# ------------------------------------------------------------------------------ the tables


def matvec_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| NVFP4 matvec | activations | us (p10-p90) | GB/s | share of read | vs torch bf16 | vs dequantise |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape'][0]} x {row['shape'][1]} | {row['dtype']} | {spread(row['times']['nvfp4'])} | {row['gb_per_s']:.1f} "
            f"| {row['share_of_read']:.0%} of {row['read_gb_per_s']:.1f} | {row['vs_torch_bf16']:.2f} x "
            f"| {row['vs_dequantize']:.0f} x |"
        )
    return lines


def op_table(dtype: torch.dtype, table: dict[str, dict[str, Times]]) -> list[str]:
    lines = [
        f"| one token, V4-Flash, {str(dtype).removeprefix('torch.')} | reference us (p10-p90) "
        "| cpu us (p10-p90) | ratio |",
        "|---|---|---|---|",
    ]
    for name, times in table.items():
        slow, fast = times["reference"], times["cpu"]
        ratio = slow.median / fast.median
        lines.append(f"| {name} | {spread(slow)} | {spread(fast)} | {ratio:.1f} x |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    library = cpu_library.kernels()
    load = os.getloadavg()[0]
    note = f"{library.path.parent.name}, {THREADS} threads, torch {torch.__version__}"
    print(f"{note}; load average at the start {load:.1f}", file=sys.stderr)
    buffer = torch.zeros(COLD_BYTES, dtype=torch.uint8).random_(0, 255)

    read, read_times = bench_bandwidth(buffer, options.seconds)
    print(f"\nPlain read loop: {read / 1e9:.1f} GB/s ({note})\n")
    dtypes = (torch.float32, torch.bfloat16)
    shapes = ((2048, 4096), (4096, 2048))
    rows = [bench_matvec(n, k, t, buffer, options.seconds) for n, k in shapes for t in dtypes]
    print("\n".join(matvec_table(rows)), flush=True)
    ops: dict[str, dict[str, dict[str, Times]]] = {}
    for dtype in dtypes:
        DENSE_CACHE.clear()
        table = {name: take_turns(v, options.seconds / 4) for name, v in layer_ops(dtype).items()}
        ops[str(dtype).removeprefix("torch.")] = table
        print("\n" + "\n".join(op_table(dtype, table)), flush=True)
    if options.json:
        result = {
            "build": library.path.parent.name,
            "threads": THREADS,
            "load_average": load,
            "read_gb_per_s": read / 1e9,
            "read": read_times,
            "matvec": rows,
            "ops": ops,
        }
        options.json.write_text(json.dumps(result, indent=1, default=Times.to_dict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
