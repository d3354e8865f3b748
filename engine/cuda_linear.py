"""The `sm90` implementations of the ops with weights: linear, grouped_linear, gate, experts.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda_library import (
    DTYPES,
    F,
    I,
    Library,
    N,
    P,
    activation,
    floats,
    sm90,
    typed,
    wrong,
)
from dsv4_bench.engine.cuda_weights import Packed, WeightStruct, pack
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank

LINEAR = Library("linear", {"linear": (P, I, N, P, N, P, I)})
GATE = Library("gate", {"gate": (P, N, N, P, P, I, N, P, N, F, P, P)})
EXPERTS = Library("experts", {"experts": (P, N, N, P, P, N, P, N, N, I, F, P, P, P, P)})

# ------------------------------------------------------------------------------ linear


@sm90("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return _matmul("linear", x, weight, 1, out_dtype or x.dtype)


@sm90("grouped_linear", LINEAR)
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    if groups < 1 or weight.shape[0] % groups:
        wrong("grouped_linear", f"{groups} groups do not divide {weight.shape[0]} rows")
    return _matmul("grouped_linear", o, weight, groups, o.dtype)


def _matmul(op: str, x: Tensor, weight: Weight, groups: int, out_dtype: torch.dtype) -> Tensor:
    """x [..., groups * k] -> [..., n] in `out_dtype`."""
    x, kind = activation(op, x)
    packed = pack(weight)
    if x.shape[-1] != groups * packed.k or packed.data.device != x.device:
        wrong(op, f"x is {list(x.shape)}, weight {weight.name!r} [{packed.n}, {packed.k}]")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    kept = out_dtype if out_dtype in DTYPES else torch.float32
    y = x.new_empty((*x.shape[:-1], packed.n), dtype=kept)
    there = y.data_ptr()
    LINEAR.call("linear", x, x.data_ptr(), kind, rows, packed.address, groups, there, DTYPES[kept])
    return y if kept is out_dtype else y.to(out_dtype)


# ------------------------------------------------------------------------------ gate


@sm90("gate", GATE)
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
    (n, _), count = x.shape, weight.shape[0]
    scores = _matmul(op, x, weight, 1, torch.float32)
    table = rows = where = None
    size = vocabulary = 0
    if tid2eid is not None:
        if tid2eid.dim() != 2 or tid2eid.dtype not in (torch.int32, torch.int64):
            wrong(op, f"tid2eid is {tid2eid.dtype} {list(tid2eid.shape)}")
        table, rows = typed(op, tid2eid, tid2eid.dtype), typed(op, tokens, torch.int64)
        size, (vocabulary, k) = table.itemsize, table.shape
        where = rows.data_ptr()
    bias = None if bias is None else floats(op, bias)
    if (bias is not None and bias.numel() != count) or (rows is not None and rows.shape != (n,)):
        wrong(op, f"x {list(x.shape)}, {count} experts, tokens {list(tokens.shape)}")
    k = k if tid2eid is not None else min(k, count)
    routing = scores.new_empty(n, k)
    chosen = torch.empty(n, k, dtype=torch.int32, device=x.device)
    GATE.call(
        op,
        x,
        scores.data_ptr(),
        n,
        count,
        None if bias is None else bias.data_ptr(),
        None if table is None else table.data_ptr(),
        size,
        vocabulary,
        where,
        k,
        scale,
        routing.data_ptr(),
        chosen.data_ptr(),
    )
    return routing, chosen, scores


# ------------------------------------------------------------------------------ experts


class ExpertTable:
    """The experts of a bank as the kernels take them: structs w1, w2, w3 of each, on the GPU.

    Making it reads the whole bank. All experts have one shape and format; global scales may differ.
    """

    def __init__(self, experts: list[Expert]) -> None:
        self.packed = [[pack(weight) for weight in expert] for expert in experts]
        w1, w2, w3 = self.packed[0]
        self.d, self.inner, self.format = w1.k, w1.n, w1.format
        wanted = [(self.inner, self.d), (self.d, self.inner), (self.inner, self.d)]
        for number, expert in enumerate(self.packed):
            _require(number, expert, wanted, self.format)
        structs = b"".join(bytes(p.struct) for expert in self.packed for p in expert)
        assert len(structs) == 3 * len(experts) * ctypes.sizeof(WeightStruct)
        host = torch.frombuffer(bytearray(structs), dtype=torch.uint8)
        self.tensor = host.to(w1.data.device)


def _require(number: int, expert: list[Packed], wanted: list[tuple[int, int]], kind: int) -> None:
    shapes = [(p.n, p.k) for p in expert]
    if shapes != wanted or any(p.format != kind for p in expert):
        formats = [p.format for p in expert]
        wrong(
            "experts", f"expert {number}: shapes {shapes}, formats {formats}, not {wanted} {kind}"
        )


_TABLES: dict[int, tuple[ExpertTable, weakref.ref[ExpertBank] | ExpertBank]] = {}


def table_of(bank: ExpertBank) -> ExpertTable:
    """The table of `bank`, made once; a bank's experts never change."""
    key = id(bank)
    entry = _TABLES.get(key)
    if entry is None:
        table = ExpertTable([bank[expert] for expert in range(len(bank))])
        owner: weakref.ref[ExpertBank] | ExpertBank
        try:
            owner = weakref.ref(bank, lambda _: _TABLES.pop(key, None))
        except TypeError:  # a list: keep it, so that its id stays its own
            owner = bank
        _TABLES[key] = entry = (table, owner)
    return entry[0]


@sm90("experts", EXPERTS, dtypes=(torch.bfloat16,))
def experts(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    op = "experts"
    if routing.shape != experts.shape or experts.dim() != 2 or len(experts) != len(x):
        wrong(op, f"x {list(x.shape)}, routing {list(routing.shape)}, ids {list(experts.shape)}")
    ids, weights = typed(op, experts, torch.int32), floats(op, routing)
    return _run_experts(op, x, ids, weights, table_of(bank), limit)


@sm90("shared_expert", EXPERTS, dtypes=(torch.bfloat16,))
def shared_expert(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    return _run_experts("shared_expert", x, None, None, _shared_table(expert), limit)


# By id(w1): the matrices of a shared expert, which itself takes no weak reference, and their table.
_SHARED: dict[int, tuple[list[weakref.ref[Weight]], ExpertTable]] = {}


def _shared_table(expert: Expert) -> ExpertTable:
    key = id(expert.w1)
    entry = _SHARED.get(key)
    if entry is None or any(ref() is not w for ref, w in zip(entry[0], expert, strict=True)):
        refs = [weakref.ref(weight) for weight in expert]
        refs[0] = weakref.ref(expert.w1, lambda _: _SHARED.pop(key, None))
        _SHARED[key] = entry = (refs, ExpertTable([expert]))
    return entry[1]


def _run_experts(
    op: str,
    x: Tensor,
    ids: Tensor | None,
    routing: Tensor | None,
    table: ExpertTable,
    limit: float,
) -> Tensor:
    x, kind = activation(op, x)
    if x.dim() != 2 or x.shape[1] != table.d or kind != DTYPES[torch.bfloat16]:
        wrong(op, f"x {list(x.shape)} {x.dtype}, w1 [{table.inner}, {table.d}]; x must be bfloat16")
    n, k = len(x), 1 if ids is None else ids.shape[1]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    hidden = x.new_empty(n * k, table.inner)
    partial = y.new_empty(n * k, table.d) if k > 1 else y
    lists = torch.empty(4 * n * k + 1, dtype=torch.int32, device=x.device)
    EXPERTS.call(
        "experts",
        x,
        x.data_ptr(),
        n,
        table.d,
        None if ids is None else ids.data_ptr(),
        None if routing is None else routing.data_ptr(),
        k,
        table.tensor.data_ptr(),
        len(table.packed),
        table.inner,
        table.format,
        limit,
        hidden.data_ptr(),
        partial.data_ptr(),
        lists.data_ptr(),
        y.data_ptr(),
    )
    return y
