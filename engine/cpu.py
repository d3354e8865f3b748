"""The `cpu` implementation of every op: shape and dtype checks, then one call into compiled code.

Signatures and contracts are those of the references in `ops`. Tensors are float32 or bfloat16;
inputs that are not contiguous are copied, arguments written in place never are.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

import dsv4_bench.engine.cpu_rows
import dsv4_bench.engine.ops  # noqa: F401  (both register)
from dsv4_bench.engine.cpu_library import (
    DTYPES,
    activation,
    cpu,
    floats,
    pack,
    plain_kv,
    run,
    same_dtype,
    typed,
    wrong,
)
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank
from dsv4_bench.engine.step import Step

# ------------------------------------------------------------------------------ linear


@cpu("linear")
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return _matmul("linear", x, weight, 1, out_dtype or x.dtype)


@cpu("grouped_linear")
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    if groups < 1 or weight.shape[0] % groups:
        wrong("grouped_linear", f"{groups} groups do not divide {weight.shape[0]} rows")
    return _matmul("grouped_linear", o, weight, groups, o.dtype)


def _matmul(op: str, x: Tensor, weight: Weight, groups: int, out_dtype: torch.dtype) -> Tensor:
    """x [..., groups * k] -> [..., n] in `out_dtype`."""
    x, kind = activation(op, x)
    packed = pack(weight)
    if x.shape[-1] != groups * packed.k:
        wrong(op, f"x is {list(x.shape)}, weight {weight.name!r} [{packed.n}, {packed.k}]")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    kept = out_dtype if out_dtype in DTYPES else torch.float32
    y = x.new_empty((*x.shape[:-1], packed.n), dtype=kept)
    threads = torch.get_num_threads()
    out_kind = DTYPES[kept]
    run("linear", x.data_ptr(), kind, rows, packed.address, groups, y.data_ptr(), out_kind, threads)
    return y if kept is out_dtype else y.to(out_dtype)


# ------------------------------------------------------------------------------ attention


@cpu("attention", requires=plain_kv)
def attention(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Tensor | None,
    entry_index: Tensor | None,
    *,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    op = "attention"
    q, kind = activation(op, q)
    n, heads, dim = q.shape
    window = _pool(op, window, q)
    window_index = _index(op, window_index, n)
    entry_rows = entry_width = 0
    entry_address = entry_index_address = None
    if entries is not None and entry_index is not None:
        entries, entry_index = _pool(op, entries, q), _index(op, entry_index, n)
        entry_rows, entry_width = entries.shape[0], entry_index.shape[1]
        entry_address, entry_index_address = entries.data_ptr(), entry_index.data_ptr()
    sink = floats(op, sink)
    if sink.numel() != heads:
        wrong(op, f"sink is {list(sink.shape)}, q has {heads} heads")
    o = torch.empty_like(q)
    lse = q.new_empty((n, heads), dtype=torch.float32)
    run(
        op,
        q.data_ptr(),
        window.data_ptr(),
        window.shape[0],
        window_index.data_ptr(),
        window_index.shape[1],
        entry_address,
        entry_rows,
        entry_index_address,
        entry_width,
        sink.data_ptr(),
        scale,
        n,
        heads,
        dim,
        o.data_ptr(),
        lse.data_ptr(),
        kind,
        torch.get_num_threads(),
        bad_index="an index is past the end of its pool",
    )
    return o, lse


def _pool(op: str, pool: Tensor, q: Tensor) -> Tensor:
    """A pool of keys [rows, head width] in q's dtype."""
    if pool.dim() != 2 or pool.shape[1] != q.shape[2]:
        wrong(op, f"a pool is {list(pool.shape)}, q {list(q.shape)}")
    return same_dtype(op, pool, q)


def _index(op: str, index: Tensor, n: int) -> Tensor:
    if index.dim() != 2 or index.shape[0] != n:
        wrong(op, f"an index is {list(index.shape)}, q has {n} tokens")
    return typed(op, index, torch.int32)


# ------------------------------------------------------------------------------ experts


@cpu("experts")
def experts(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    op = "experts"
    if routing.shape != experts.shape or experts.dim() != 2 or len(experts) != len(x):
        wrong(op, f"x {list(x.shape)}, routing {list(routing.shape)}, ids {list(experts.shape)}")
    chosen = sorted(set(experts.flatten().tolist()))
    count = len(bank)
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        bad = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ValueError(f"expert id {bad} is out of range: the layer has {count} experts")
    y = torch.zeros(x.shape, dtype=torch.float32)
    ids, weights = typed(op, experts, torch.int32), floats(op, routing)
    for expert in chosen:
        _add_expert(op, x, bank[expert], limit, y, expert, ids, weights)
    return y


@cpu("shared_expert")
def shared_expert(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float32)
    _add_expert("shared_expert", x, expert, limit, y, 0, None, None)
    return y


def _add_expert(
    op: str,
    x: Tensor,
    expert: Expert,
    limit: float,
    y: Tensor,
    number: int,
    ids: Tensor | None,
    routing: Tensor | None,
) -> None:
    """y += expert(x) for the rows whose ids hold `number`, or for all rows without ids."""
    x, kind = activation(op, x)
    gate, down, up = (pack(weight) for weight in expert)
    d, inner = gate.k, gate.n
    if (
        x.dim() != 2
        or x.shape[1] != d
        or (up.n, up.k) != (inner, d)
        or (down.n, down.k) != (d, inner)
    ):
        shapes = ", ".join(f"[{w.n}, {w.k}]" for w in (gate, down, up))
        wrong(op, f"x {list(x.shape)}, w1, w2, w3 {shapes}")
    run(
        "expert",
        x.data_ptr(),
        kind,
        x.shape[0],
        None if ids is None else ids.data_ptr(),
        None if routing is None else routing.data_ptr(),
        0 if ids is None else ids.shape[1],
        number,
        gate.address,
        up.address,
        down.address,
        limit,
        y.data_ptr(),
        torch.get_num_threads(),
    )


@cpu("moe_sum")
def moe_sum(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    op = "moe_sum"
    if routed.shape != shared.shape:
        wrong(op, f"routed {list(routed.shape)}, shared {list(shared.shape)}")
    if dtype not in DTYPES:
        wrong(op, f"the result is float32 or bfloat16, not {dtype}")
    a, b = floats(op, routed), floats(op, shared)
    out = torch.empty(a.shape, dtype=dtype)
    threads = torch.get_num_threads()
    run(op, a.data_ptr(), b.data_ptr(), a.numel(), out.data_ptr(), DTYPES[dtype], threads)
    return out


@cpu("gate")
def gate(
    x: Tensor,
    tokens: Tensor,
    *,
    weight: Weight,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "gate"
    x, kind = activation(op, x)
    packed = pack(weight)
    n, count = x.shape[0], packed.n
    if x.dim() != 2 or x.shape[1] != packed.k or (bias is not None and bias.numel() != count):
        wrong(op, f"x {list(x.shape)}, weight [{count}, {packed.k}], bias {bias is not None}")
    given = None if tid2eid is None else typed(op, tid2eid[tokens], torch.int32)  # [n, k]
    bias = None if bias is None else floats(op, bias)
    k = min(k, count) if given is None else given.shape[1]
    routing = torch.empty(n, k)
    chosen = torch.empty(n, k, dtype=torch.int32)
    scores = torch.empty(n, count)
    run(
        op,
        x.data_ptr(),
        kind,
        packed.address,
        n,
        None if bias is None else bias.data_ptr(),
        None if given is None else given.data_ptr(),
        k,
        scale,
        routing.data_ptr(),
        chosen.data_ptr(),
        scores.data_ptr(),
        torch.get_num_threads(),
        bad_index=f"tid2eid names an expert out of range: the layer has {count} experts",
    )
    return routing, chosen, scores


# ------------------------------------------------------------------------------ compressor, indexer


def _int64s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


@cpu("compressor")
def compressor(
    kv: Tensor,
    score: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    step: Step,
    *,
    ape: Tensor,
) -> Tensor:
    op = "compressor"
    (ratio, width), (batch, slots, _) = ape.shape, kv_state.shape
    tokens = (sum(step.lengths), width)
    state = (len(step.lengths), slots, width)
    if kv.shape != tokens or score.shape != tokens or slots not in (ratio, 2 * ratio):
        wrong(op, f"kv {list(kv.shape)}, score {list(score.shape)}, ape {list(ape.shape)}")
    if kv_state.shape != state or score_state.shape != state:
        wrong(op, f"states {list(kv_state.shape)}, {list(score_state.shape)}, not {list(state)}")
    kv, score, ape = floats(op, kv), floats(op, score), floats(op, ape)
    states = [_writable(op, kv_state), _writable(op, score_state)]
    spans = zip(step.starts, step.lengths, strict=True)
    windows = sum((start % ratio + length) // ratio for start, length in spans)
    overlap = slots == 2 * ratio
    pooled = torch.empty(windows, width // 2 if overlap else width)
    run(
        op,
        kv.data_ptr(),
        score.data_ptr(),
        states[0].data_ptr(),
        states[1].data_ptr(),
        _int64s(step.starts),
        _int64s(step.lengths),
        batch,
        ratio,
        width,
        overlap,
        ape.data_ptr(),
        pooled.data_ptr(),
        torch.get_num_threads(),
    )
    for given, written in zip((kv_state, score_state), states, strict=True):
        if written is not given:
            given.copy_(written)
    return pooled


def _writable(op: str, state: Tensor) -> Tensor:
    """A float32 argument that is written in place; a copy to be written back if not contiguous."""
    if state.dtype != torch.float32 or not state.is_cpu:
        wrong(op, f"the state is float32 in CPU memory, not {state.dtype} on {state.device}")
    return state if state.is_contiguous() else state.contiguous()


@cpu("index_score")
def index_score(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    op = "index_score"
    q, kind = activation(op, q)
    n, heads, dim = q.shape
    batch, capacity, _ = keys.shape
    total = step.entries(ratio)
    if keys.shape[2] != dim or weights.shape != (n, heads) or batch != len(step.lengths):
        wrong(op, f"q {list(q.shape)}, keys {list(keys.shape)}, weights {list(weights.shape)}")
    if n != sum(step.lengths) or total > capacity:
        wrong(op, f"{n} tokens and {capacity} entries, the step has {total} entries")
    keys = same_dtype(op, keys, q)
    weights, weights_kind = activation(op, weights)
    score = torch.empty(n, total)
    run(
        op,
        q.data_ptr(),
        keys.data_ptr(),
        weights.data_ptr(),
        _int64s(step.starts),
        _int64s(step.lengths),
        batch,
        ratio,
        heads,
        dim,
        capacity,
        total,
        scale,
        score.data_ptr(),
        kind,
        weights_kind,
        torch.get_num_threads(),
    )
    return score


@cpu("index_topk")
def index_topk(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    op = "index_topk"
    n, total = score.shape
    if visible.shape != (n,):
        wrong(op, f"score {list(score.shape)}, visible {list(visible.shape)}")
    score, visible = floats(op, score), typed(op, visible, torch.int64)
    k = min(k, total)
    index = torch.empty(n, k, dtype=torch.int32)
    threads = torch.get_num_threads()
    run(op, score.data_ptr(), visible.data_ptr(), n, total, k, index.data_ptr(), threads)
    return index


# ------------------------------------------------------------------------------ this machine


def read_bandwidth_pass(data: Tensor) -> None:
    """Read all of `data` once with torch's number of threads; time it to get bytes per second."""
    total = ctypes.c_float()
    run(
        "read_bytes", data.data_ptr(), data.nbytes, ctypes.addressof(total), torch.get_num_threads()
    )
