"""The `sm90` implementations of the routed and shared experts; the table of their weights.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
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
from dsv4_bench.engine.cuda.linear import LINEAR, matmul
from dsv4_bench.engine.cuda.skinny import SKINNY
from dsv4_bench.engine.cuda.weights import Packed, WeightStruct, pack
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank

EXPERTS = Library(
    "experts",
    {"experts": (P, N, N, P, P, N, P, N, N, I, F, P, P, P, P), "swiglu": (P, P, N, F)},
)
_STREAMED_ROWS = 8  # of a shared expert, as the experts' kernels stream its weights


class ExpertTable:
    """Experts as the kernels take them: structs w1, w2, w3 of each, on the GPU.

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


@sm90("shared_expert", EXPERTS, dtypes=(torch.bfloat16,), also=(LINEAR, SKINNY))
def shared_expert(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    op = "shared_expert"
    table = _shared_table(expert)
    if len(x) <= _STREAMED_ROWS:
        return _run_experts(op, x, None, None, table, limit)
    x = _checked(op, x, table)
    gate, up = (matmul(op, x, weight, 1, torch.bfloat16) for weight in (expert.w1, expert.w3))
    EXPERTS.call("swiglu", gate, gate.data_ptr(), up.data_ptr(), gate.numel(), limit)
    return matmul(op, gate, expert.w2, 1, torch.float32)


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


def _checked(op: str, x: Tensor, table: ExpertTable) -> Tensor:
    """`x` dense, of the experts' width and bfloat16."""
    x, kind = activation(op, x)
    if x.dim() != 2 or x.shape[1] != table.d or kind != DTYPES[torch.bfloat16]:
        wrong(op, f"x {list(x.shape)} {x.dtype}, w1 [{table.inner}, {table.d}]; x must be bfloat16")
    return x


def _run_experts(
    op: str,
    x: Tensor,
    ids: Tensor | None,
    routing: Tensor | None,
    table: ExpertTable,
    limit: float,
) -> Tensor:
    x = _checked(op, x, table)
    n, k = len(x), 1 if ids is None else ids.shape[1]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    hidden = x.new_empty(n * k, table.inner)
    partial = y.new_empty(n * k, table.d) if k > 1 else y
    lists = torch.empty(5 * n * k + 1, dtype=torch.int32, device=x.device)
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
