"""Runs the captured ops of a bundle again with nothing but torch; every bundle carries it as replay.py

    python replay.py                          every captured op, against a plain reference
    python replay.py 'L3/*'                   only these sites
    python replay.py --function mine.py:attention L3/attn/core
                                              your function in place of the one that was captured
    python replay.py --device cuda ...        tensors on a GPU, with the same strides and aliasing
    python replay.py --list                   what there is: shapes, strides, weights

For each op: how far the captured outputs are from the float64 reference computed here, beside the
limit of the run they come from; and whether the reference here gives the bits of the one there.
Exit code 0: all within their limits; 1: some are not; 3: some could not be run.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


# ------------------------------------------------------------------------------ weights


@dataclass
class Weight:
    """A [n, k] matrix as the checkpoint stores it.

    nvfp4: two e2m1 a byte, low nibble first, e4m3 scales of 16, times global_scale. mxfp4: e8m0
    scales of 32. fp8_block: e4m3 with scales of 128 x 128. dense: as it is.
    """

    name: str
    format: str
    data: Tensor
    scale: Tensor | None
    global_scale: float = 1.0
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.data.shape
        return n, 2 * k if self.format in ("nvfp4", "mxfp4") else k

    def dequantize(self) -> Tensor:
        """float32 [n, k]."""
        if self.scale is None:
            return self.data.float()
        factors = self.scale.float()
        if self.scale.dtype == torch.float8_e8m0fnu:
            factors = torch.exp2(self.scale.view(torch.uint8).float() - 127)
        if self.format == "fp8_block":
            n, k = self.data.shape
            factors = factors.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
            return self.data.float() * factors
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = torch.tensor(magnitudes + [-m for m in magnitudes], device=self.data.device)
        codes = self.data.view(torch.uint8).int()
        values = table[torch.stack((codes & 15, codes >> 4), -1).flatten(1)]  # [n, k]
        values = (values.unflatten(1, (factors.shape[1], -1)) * factors[..., None]).flatten(1)
        return values * self.global_scale if self.format == "nvfp4" else values

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        return self.dequantize()[start:stop]


class DENSE_CACHE:
    """Where the reference asks for dequantised weights; nothing is kept here."""

    @staticmethod
    def get(weight: Weight) -> Tensor | None:
        n, k = weight.shape
        return None if 4 * n * k > 1 << 27 else weight.dequantize()


class Experts:
    """The experts that the captured calls used, by number."""

    def __init__(self, count: int, experts: dict[int, Any]) -> None:
        self.count, self.experts = count, experts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, expert: int) -> Any:
        return self.experts[expert]


# ------------------------------------------------------------------------------ ops


class Op(NamedTuple):
    """A reference with the names of what it returns and of what it writes in place."""

    function: Callable[..., Any]
    outputs: tuple[str, ...]
    mutates: tuple[str, ...]
    discrete: tuple[str, ...]


OPS: dict[str, Op] = {}


def op(
    name: str,
    *,
    outputs: tuple[str, ...],
    mutates: tuple[str, ...] = (),
    discrete: tuple[str, ...] = (),
    **costs: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the decorated function as the reference of op `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPS[name] = Op(function, outputs, mutates, discrete)
        return function

    return register


def nbytes(value: Any) -> int:
    return int(getattr(value, "nbytes", 0))


# The references of the ops follow here, as the engine has them.
# @references@


# ------------------------------------------------------------------------------ reading


def read_storages(path: Path, device: str) -> dict[str, Tensor]:
    """safetensors: 8 bytes length, JSON header, data. Every entry is one piece of memory, uint8."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    storages = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        memory = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            memory.copy_(torch.frombuffer(bytearray(raw[start:stop]), dtype=torch.uint8))
        storages[name] = memory.to(device)
    return storages


class Reader:
    """Values of calls.json; tensors that shared memory when they were captured share it again.

    `fresh` forgets the memory of a call, so that the next one finds it as it was captured.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.files: dict[str, dict[str, Tensor]] = {}

    def fresh(self) -> None:
        self.files = {n: s for n, s in self.files.items() if n.startswith("weights/")}

    def value(self, data: dict[str, Any]) -> Any:
        kind = data["kind"]
        if kind == "tensor":
            return self.tensor(data)
        if kind == "weight":
            scale = None if data["scale"] is None else self.tensor(data["scale"])
            numbers = (float(data["global_scale"]), data["input_scale"])
            return Weight(data["name"], data["format"], self.tensor(data["data"]), scale, *numbers)
        if kind == "expert":
            return Expert(*(self.value(data[leaf]) for leaf in ("w1", "w2", "w3")))  # type: ignore[name-defined]  # noqa: F821
        if kind == "experts":
            experts = {int(number): self.value(e) for number, e in data["experts"].items()}
            return Experts(data["count"], experts)
        if kind == "step":
            tokens = self.tensor(data["tokens"])
            starts, lengths = tuple(data["starts"]), tuple(data["lengths"])
            return Step(tokens, starts, lengths, data["window"])  # type: ignore[name-defined]  # noqa: F821
        if kind == "dtype":
            return DTYPES[data["dtype"]]
        value = data["value"]
        return float(value) if isinstance(value, str) else value

    def tensor(self, data: dict[str, Any]) -> Tensor:
        if data["file"] not in self.files:
            self.files[data["file"]] = read_storages(self.folder / data["file"], self.device)
        memory = self.files[data["file"]][data["storage"]]
        empty = torch.empty(0, dtype=DTYPES[data["dtype"]], device=self.device)
        return empty.set_(memory.untyped_storage(), data["offset"], data["shape"], data["stride"])


# ------------------------------------------------------------------------------ replaying


def run(
    call: dict[str, Any], site: dict[str, Any], reader: Reader, function: Any
) -> dict[str, Tensor]:
    """Outputs of `function` on the call's arguments, by name; those written in place included."""
    reader.fresh()
    spec = OPS[site["op"]]
    arguments = {name: reader.value(data) for name, data in call["inputs"].items()}
    constants = {name: reader.value(data) for name, data in site["params"].items()}
    result = function(*arguments.values(), **constants)
    values = result if isinstance(result, tuple) else (result,)
    named = {n: v for n, v in zip(spec.outputs, values, strict=False) if v is not None}
    return {**named, **{name: arguments[name] for name in spec.mutates}}


def oracle(call: dict[str, Any], site: dict[str, Any], reader: Reader) -> dict[str, Tensor]:
    """The reference in float64."""
    spec = OPS[site["op"]]

    def wide(*args: Any, **constants: Any) -> Any:
        given = {n: v if n == "freqs" else widened(v) for n, v in constants.items()}
        if "out_dtype" in given:
            given["out_dtype"] = None
        values = [widened(v) for v in args]
        written.update(zip(call["inputs"], values, strict=True))
        with double_precision():  # type: ignore[name-defined]  # noqa: F821
            return spec.function(*values, **given)

    written: dict[str, Any] = {}
    outputs = run(call, site, reader, wide)
    return {**outputs, **{name: written[name] for name in spec.mutates}}


def widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value


def relative(value: Tensor, truth: Tensor, discrete: bool) -> tuple[float, float]:
    """Relative L2 of the whole, and of the worst row (one far below the others counts as 1 % of them).

    Infinite where non-finite values stand in other places; of sets the share that differs.
    """
    if value.shape != truth.shape:
        return math.inf, math.inf
    if not value.numel():
        return 0.0, 0.0
    if discrete:
        differ = (value.sort(-1).values != truth.sort(-1).values).any(-1)
        return float(differ.double().mean()), float(differ.double().mean())
    a, b = value.double(), truth.double()
    odd = ~(torch.isfinite(a) & torch.isfinite(b)) & ~((a == b) | (a.isnan() & b.isnan()))
    if bool(odd.any()):
        return math.inf, math.inf
    fine = torch.isfinite(a) & torch.isfinite(b)
    gaps = torch.where(fine, a - b, 0.0).reshape(len(a), -1).norm(dim=1)
    sizes = torch.where(fine, b, 0.0).reshape(len(a), -1).norm(dim=1)
    whole = float(sizes.norm())
    if whole == 0:
        return float(gaps.norm()), float(gaps.norm())
    least = max(0.01 * whole / len(sizes) ** 0.5, 1e-30)
    return float(gaps.norm()) / whole, float((gaps / sizes.clamp(min=least)).max())


def worst_place(value: Tensor, truth: Tensor) -> str:
    """Where the two are furthest apart, with both values."""
    if value.shape != truth.shape or not value.numel():
        return f"{list(value.shape)} instead of {list(truth.shape)}"
    a, b = value.double(), truth.double()
    gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return f"{list(at)}: {float(a[at]):.6g}, should be {float(b[at]):.6g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def replay(
    call: dict[str, Any], site: dict[str, Any], reader: Reader, function: Any
) -> Iterator[str]:
    """Lines about one call; those that begin with OVER are over their limit."""
    spec = OPS[site["op"]]
    truth = oracle(call, site, reader)
    reference = run(call, site, reader, spec.function)
    reader.fresh()
    stored = {name: reader.value(data) for name, data in call["outputs"].items()}
    right = {name: reader.value(data) for name, data in call["reference"].items()}
    if function is not None:
        stored = run(call, site, reader, function)
    for name, check in call["checks"].items():
        if check["verdict"] == "unjudged":
            continue
        if name not in stored:
            yield f"OVER   {name} is missing"
            continue
        error, row = relative(stored[name], truth[name], name in spec.discrete)
        limit, limit_row = float(check["limit"]), float(check["limit_row"])
        fine = error <= limit and row <= limit_row
        text = f"{name}: error {error:.3g}, limit {limit:.3g}"
        if not fine:
            place = worst_place(stored[name], truth[name])
            text += f"; worst row {row:.3g}, limit {limit_row:.3g}; worst at {place}"
        bits = "equal" if same_bits(reference[name], right[name]) else "differ"
        yield f"{'ok    ' if fine else 'OVER  '} {text}; reference bits {bits}"


def describe(data: dict[str, Any]) -> str:
    """An argument in words."""
    if data["kind"] == "tensor":
        shape, stride = data["shape"], data["stride"]
        dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        layout = "" if stride == dense else f" stride {stride}"
        return f"{data['dtype']} {shape}{layout} in {data['storage']}"
    if data["kind"] == "weight":
        return f"{data['format']} weight {data['name']}"
    return str(data.get("value", data.get("dtype", data["kind"])))


def load_function(text: str) -> Any:
    """mine.py:attention -> the function."""
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location("mine", file)
    if spec is None or spec.loader is None:
        sys.exit(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", nargs="?", default="*", help="a site, or a glob")
    parser.add_argument(
        "--function", metavar="FILE.py:NAME", help="run this in place of the captured one"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="only say what was captured")
    parser.add_argument("--bundle", default=str(Path(__file__).parent), help="the unpacked folder")
    args = parser.parse_args()
    folder = Path(args.bundle)
    document = json.loads((folder / "calls.json").read_text())
    function = load_function(args.function) if args.function else None
    reader = Reader(folder, args.device)
    over = failed = count = 0
    for call in document["calls"]:
        if not fnmatch.fnmatchcase(call["site"], args.site):
            continue
        count += 1
        site = document["sites"][call["site"]]
        ran = args.function or call["stamp"].get("implementation", "?")
        print(f"{call['site']} #{call['forward']}  {site['op']}, {ran}")
        if args.list:
            for name, data in {**call["inputs"], **site["params"]}.items():
                print(f"    {name}: {describe(data)}")
            continue
        try:
            with torch.inference_mode():
                for line in replay(call, site, reader, function):
                    over += line.startswith("OVER")
                    print(f"    {line}")
        except Exception as error:
            failed += 1
            print(f"    FAILED {type(error).__name__}: {error}")
    print(f"{count} ops, {over} outputs over their limit, {failed} ops could not be run")
    return 1 if over else 3 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
