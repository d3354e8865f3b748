"""The `sm90` implementations of the routed and shared experts, alone and together; their weights' table.

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
from dsv4_bench.engine.cuda.weights import Packed, WeightStruct, pack
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank

EXPERTS = Library("experts", {"experts": (P, N, N, P, P, N, P, N, N, I, F, P, P, P, P)})
MOE = Library("moe", {"moe": (P, N, N, P, P, N, P, N, N, I, P, N, I, F, P, P, P, P, P, P, P, I)})
_MOST_TOKENS = 8  # whose shared expert runs beside the routed ones
# enum dsv4_format: those of a shared expert by those of the routed ones.
_BESIDE = {0: (2, 3), 1: (2, 3)}


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


def moe_fits(bank: ExpertBank, shared: Expert, n: int) -> bool:
    """Whether `moe` takes n tokens of these experts. The first call for a bank packs its weights."""
    if not 0 < n <= _MOST_TOKENS:
        return False
    routed, beside = table_of(bank), _shared_table(shared)
    return beside.d == routed.d and beside.format in _BESIDE.get(routed.format, ())


def moe(
    x: Tensor,
    routing: Tensor,
    experts: Tensor,
    *,
    bank: ExpertBank,
    shared: Expert,
    limit: float,
    dtype: torch.dtype,
    outs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Ops experts, shared_expert and moe_sum of few tokens, to the bit, in the launches of the first.

    x [n, d] bfloat16, routing [n, k] float32, experts [n, k] int32 -> [n, d] in `dtype`, float32 or
    bfloat16. `outs`, float32 [n, d] each, are filled with what the first two ops return. Raises
    DSV4Error for what `moe_fits` does not take.
    """
    op = "moe"
    if not moe_fits(bank, shared, len(x)):
        wrong(
            op, f"{len(x)} tokens, or formats of routed and shared experts that do not go together"
        )
    if routing.shape != experts.shape or experts.dim() != 2 or len(experts) != len(x):
        wrong(op, f"x {list(x.shape)}, routing {list(routing.shape)}, ids {list(experts.shape)}")
    table, beside = table_of(bank), _shared_table(shared)
    x = _checked(op, x, table)
    ids, weights = typed(op, experts, torch.int32), floats(op, routing)
    (n, k), device = ids.shape, x.device
    y = torch.empty(x.shape, dtype=dtype, device=device)
    hidden, shared_hidden = x.new_empty(n * k, table.inner), x.new_empty(n, beside.inner)
    partial = torch.empty(n * k, table.d, dtype=torch.float32, device=device)
    routed_y = None if outs is None else outs[0].data_ptr()
    shared_y = torch.empty(x.shape, dtype=torch.float32, device=device) if outs is None else outs[1]
    lists = torch.empty(4 * n * k + 1, dtype=torch.int32, device=device)
    MOE.call(
        "moe",
        x,
        x.data_ptr(),
        n,
        table.d,
        ids.data_ptr(),
        weights.data_ptr(),
        k,
        table.tensor.data_ptr(),
        len(table.packed),
        table.inner,
        table.format,
        beside.tensor.data_ptr(),
        beside.inner,
        beside.format,
        limit,
        hidden.data_ptr(),
        shared_hidden.data_ptr(),
        partial.data_ptr(),
        routed_y,
        shared_y.data_ptr(),
        lists.data_ptr(),
        y.data_ptr(),
        DTYPES[dtype],
    )
    return y


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
