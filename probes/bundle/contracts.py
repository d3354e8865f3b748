"""What every op may assume of its arguments, checked for arguments that come from a stranger.

Kernels take pointers: an index past its pool or a state of the wrong size would make them read what
is not theirs. Shapes that a reference would reject with an exception of torch's are left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import OpSpec
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.bundle.format import BadBundle, short
from dsv4_bench.probes.bundle.values import ExpertSubset

Arguments = dict[str, Any]
_FLOATS = (torch.float32, torch.bfloat16)


def check_call(
    spec: OpSpec,
    arguments: Arguments,
    outputs: dict[str, Any],
    reference: dict[str, Any],
    where: str,
) -> None:
    """Raise BadBundle unless the arguments keep the contract of the op."""
    for table in (outputs, reference):
        for name, value in table.items():
            if not isinstance(value, Tensor):
                raise BadBundle(f"{where}: output {name} is no tensor")
    try:
        for name, value in arguments.items():
            _check_type(name, value)
        CONTRACTS[spec.name](arguments)
        _check_sizes(spec.name, arguments, reference)
    except _Broken as broken:
        raise BadBundle(f"{where}: {broken}") from None


def _check_sizes(op: str, a: Arguments, reference: dict[str, Tensor]) -> None:
    """Outputs that may be far larger than the inputs have to be in the bundle at that size."""
    shape: tuple[int, ...] = ()
    if op in ("linear", "grouped_linear"):
        name, rows = ("y", a["x"]) if op == "linear" else ("z", a["o"])
        shape = (len(rows), a["weight"].shape[0])
    elif op == "index_score":
        name, shape = "score", (len(a["q"]), a["step"].entries(a["ratio"]))
    elif op == "embed":
        name, shape = "x", (len(a["tokens"]), a["hc"], a["weight"].shape[1])
    elif op == "gate":
        name, shape = "scores", (len(a["x"]), a["weight"].shape[0])
    if shape and (name not in reference or tuple(reference[name].shape) != shape):
        found = list(reference[name].shape) if name in reference else "missing"
        raise _Broken(f"{name} of the reference is {found}, not {list(shape)}")


class _Broken(Exception):
    """What is wrong with the arguments."""


def _check_type(name: str, value: Any) -> None:
    kinds = _TYPES.get(name, (Tensor,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _Broken(f"{name} is {short(value)}")


_NUMBER = (float, int)
_TYPES: dict[str, tuple[type, ...]] = {
    "weight": (Tensor, Weight, type(None)),
    "bank": (ExpertSubset,),
    "expert": (Expert,),
    "step": (Step,),
    "dtype": (torch.dtype,),
    "out_dtype": (torch.dtype, type(None)),
    "inverse": (bool,),
    "bias": (Tensor, type(None)),
    "tid2eid": (Tensor, type(None)),
    "entries": (Tensor, type(None)),
    "entry_index": (Tensor, type(None)),
    **dict.fromkeys(("hc", "iters", "k", "groups", "ratio"), (int,)),
    **dict.fromkeys(("eps", "norm_eps", "limit"), _NUMBER),
    "scale": (Tensor, *_NUMBER),
}


# ------------------------------------------------------------------------------ words of the checks


def _tensor(
    a: Arguments, name: str, dims: int, dtypes: tuple[torch.dtype, ...] = _FLOATS
) -> Tensor:
    value = a[name]
    if not isinstance(value, Tensor) or value.dim() != dims or value.dtype not in dtypes:
        shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else short(value)
        raise _Broken(f"{name} is {shown}, not {dims}-dimensional {[str(d) for d in dtypes]}")
    return value


def _shape(a: Arguments, name: str, *shape: int) -> None:
    if tuple(a[name].shape) != shape:
        raise _Broken(f"{name} is {list(a[name].shape)}, not {list(shape)}")


def _within(a: Arguments, name: str, low: int, high: int) -> None:
    """Integers in [low, high)."""
    value = a[name]
    if value.numel():
        least, most = (int(v) for v in value.aminmax())
        if least < low or most >= high:
            raise _Broken(f"{name} holds {least if least < low else most}, not in [{low}, {high})")


def _range(a: Arguments, name: str, low: float, high: float) -> None:
    if not low <= a[name] <= high:  # False for NaN
        raise _Broken(f"{name} is {a[name]}, not in [{low}, {high}]")


def _matrix(a: Arguments, name: str, columns: int | None = None) -> tuple[int, int]:
    weight = a[name]
    if not isinstance(weight, Weight):
        raise _Broken(f"{name} is {short(weight)}, not a weight")
    n, k = weight.shape
    if n < 1 or k < 1 or (columns is not None and k != columns):
        raise _Broken(f"{name} is [{n}, {k}], its input has {columns} columns")
    return n, k


def _step(a: Arguments, rows: int) -> Step:
    step: Step = a["step"]
    if sum(step.lengths) != rows:
        raise _Broken(f"the step brings {sum(step.lengths)} tokens, there are {rows} rows")
    return step


# ------------------------------------------------------------------------------ one per op


def _embed(a: Arguments) -> None:
    _tensor(a, "tokens", 1, (torch.int64,))
    v, _ = _matrix(a, "weight")
    if a["weight"].format != "dense":
        raise _Broken("the embedding is not dense")
    _within(a, "tokens", 0, v)
    _range(a, "hc", 1, 64)
    _dtype(a, "dtype")


def _dtype(a: Arguments, name: str) -> None:
    if a[name] not in (None, *_FLOATS):
        raise _Broken(f"{name} is {a[name]}")


def _hyper(rows: Callable[[int], int], scales: int) -> Callable[[Arguments], None]:
    def check(a: Arguments) -> None:
        _, hc, d = _tensor(a, "x", 3).shape
        for name, dims in (("fn", 2), ("scale", 1), ("base", 1)):
            _tensor(a, name, dims)
        _shape(a, "fn", rows(hc), hc * d)
        _shape(a, "scale", scales)
        _shape(a, "base", rows(hc))
        if "iters" in a:
            _range(a, "iters", 1, 1000)

    return check


def _hc_post(a: Arguments) -> None:
    n, hc, d = _tensor(a, "x", 3).shape
    _tensor(a, "y", 2)
    _tensor(a, "post", 2)
    _tensor(a, "comb", 3)
    _shape(a, "y", n, d)
    _shape(a, "post", n, hc)
    _shape(a, "comb", n, hc, hc)


def _rms_norm(a: Arguments) -> None:
    x = a["x"]
    if x.dim() not in (2, 3) or x.dtype not in _FLOATS or not x.shape[-1]:
        raise _Broken(f"x is {x.dtype} {list(x.shape)}")
    if a["weight"] is not None:
        _tensor(a, "weight", 1)
        _shape(a, "weight", x.shape[-1])


def _linear(a: Arguments) -> None:
    _matrix(a, "weight", _tensor(a, "x", 2).shape[1])
    _dtype(a, "out_dtype")


def _grouped_linear(a: Arguments) -> None:
    width = _tensor(a, "o", 2).shape[1]
    n, k = _matrix(a, "weight")
    _range(a, "groups", 1, 4096)
    if a["groups"] * k != width or n % a["groups"]:
        raise _Broken(f"{a['groups']} groups of [{n}, {k}] on {width} columns")


def _rope(a: Arguments) -> None:
    x = a["x"]
    if x.dim() not in (2, 3) or x.dtype not in _FLOATS:
        raise _Broken(f"x is {x.dtype} {list(x.shape)}")
    _tensor(a, "positions", 1, (torch.int64,))
    _shape(a, "positions", x.shape[0])
    freqs = _tensor(a, "freqs", 1, (torch.float32,))
    if not 0 < 2 * len(freqs) <= x.shape[-1]:
        raise _Broken(f"{len(freqs)} frequencies for {x.shape[-1]} columns")


def _cache_write(a: Arguments) -> None:
    m, d = _tensor(a, "rows", 2).shape
    _tensor(a, "slots", 1, (torch.int64,))
    cache = _tensor(a, "cache", 2)
    _shape(a, "slots", m)
    if cache.shape[1] != d:
        raise _Broken(f"rows of {d}, cache of {cache.shape[1]} columns")
    _within(a, "slots", -1, len(cache))


def _gather_swa(a: Arguments) -> None:
    if _tensor(a, "ring", 2).shape[1] != _tensor(a, "kv", 2).shape[1]:
        raise _Broken("ring and kv differ in width")


def _compressor(a: Arguments) -> None:
    ratio, width = _tensor(a, "ape", 2, (torch.float32,)).shape
    n = _tensor(a, "kv", 2).shape[0]
    step = _step(a, n)
    _tensor(a, "score", 2)
    for name in ("kv", "score"):
        _shape(a, name, n, width)
    for name in ("kv_state", "score_state"):
        slots = _tensor(a, name, 3, (torch.float32,)).shape[1]
        if ratio < 1 or slots not in (ratio, 2 * ratio) or width % 2:
            raise _Broken(f"{name} has {slots} slots of {width}, the ratio is {ratio}")
        _shape(a, name, len(step.lengths), slots, width)
    _shape(a, "score_state", *a["kv_state"].shape)


def _index_score(a: Arguments) -> None:
    n, heads, dim = _tensor(a, "q", 3).shape
    step = _step(a, n)
    _range(a, "ratio", 1, 4096)
    _tensor(a, "weights", 2)
    batch, capacity, width = _tensor(a, "keys", 3).shape
    _shape(a, "weights", n, heads)
    total = step.entries(a["ratio"])
    if batch != len(step.lengths) or width != dim or total > capacity:
        raise _Broken(f"keys {list(a['keys'].shape)} for {len(step.lengths)} x {total} x {dim}")


def _index_topk(a: Arguments) -> None:
    n, total = _tensor(a, "score", 2, (torch.float32,)).shape
    _tensor(a, "visible", 1, (torch.int64,))
    _shape(a, "visible", n)
    _within(a, "visible", 0, total + 1)
    _range(a, "k", 1, 1 << 20)


def _attention(a: Arguments) -> None:
    n, heads, dim = _tensor(a, "q", 3).shape
    _tensor(a, "sink", 1, (torch.float32, torch.bfloat16))
    _shape(a, "sink", heads)
    if (a["entries"] is None) != (a["entry_index"] is None):
        raise _Broken("entries and entry_index come together")
    for pool, index in (("window", "window_index"), ("entries", "entry_index")):
        if a[pool] is None:
            continue
        rows, width = _tensor(a, pool, 2).shape
        if width != dim or _tensor(a, index, 2, (torch.int32,)).shape[0] != n:
            raise _Broken(f"{pool} {list(a[pool].shape)}, {index} {list(a[index].shape)}")
        _within(a, index, -1, rows)


def _gate(a: Arguments) -> None:
    n, d = _tensor(a, "x", 2).shape
    count, _ = _matrix(a, "weight", d)
    _tensor(a, "tokens", 1, (torch.int64,))
    _shape(a, "tokens", n)
    _range(a, "k", 1, count)
    if a["bias"] is not None:
        _tensor(a, "bias", 1)
        _shape(a, "bias", count)
    if a["tid2eid"] is not None:
        integers = (torch.int64, torch.int32, torch.int16)
        table = _tensor(a, "tid2eid", 2, integers)
        _within(a, "tid2eid", 0, count)
        _within(a, "tokens", 0, len(table))


def _experts(a: Arguments) -> None:
    n, d = _tensor(a, "x", 2).shape
    bank: ExpertSubset = a["bank"]
    ids = _tensor(a, "experts", 2, (torch.int32, torch.int64))
    _tensor(a, "routing", 2)
    if ids.shape[0] != n:
        raise _Broken(f"{n} rows, ids {list(ids.shape)}")
    _shape(a, "routing", *ids.shape)
    missing = sorted(set(ids.flatten().tolist()) - set(bank.experts))
    if missing:
        raise _Broken(f"expert {missing[0]} is used and not in the bundle")
    for number, expert in bank.experts.items():
        if expert.w1.shape[1] != d:
            raise _Broken(f"expert {number} takes {expert.w1.shape[1]} columns, x has {d}")


def _shared_expert(a: Arguments) -> None:
    d = _tensor(a, "x", 2).shape[1]
    if a["expert"].w1.shape[1] != d:
        raise _Broken(f"the expert takes {a['expert'].w1.shape[1]} columns, x has {d}")


def _moe_sum(a: Arguments) -> None:
    _tensor(a, "routed", 2)
    _tensor(a, "shared", 2)
    _shape(a, "shared", *a["routed"].shape)
    _dtype(a, "dtype")


CONTRACTS: dict[str, Callable[[Arguments], None]] = {
    "embed": _embed,
    "hc_pre": _hyper(lambda hc: (2 + hc) * hc, 3),
    "hc_post": _hc_post,
    "hc_head": _hyper(lambda hc: hc, 1),
    "rms_norm": _rms_norm,
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "rope": _rope,
    "cache_write": _cache_write,
    "gather_swa": _gather_swa,
    "compressor": _compressor,
    "index_score": _index_score,
    "index_topk": _index_topk,
    "attention": _attention,
    "gate": _gate,
    "experts": _experts,
    "shared_expert": _shared_expert,
    "moe_sum": _moe_sum,
}
