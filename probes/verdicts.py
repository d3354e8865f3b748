"""Is one implementation right on captured inputs: its contract, its limits, its decisions, its memory"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import OpSpec
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.decisions import members, spread
from dsv4_bench.probes.layout import clone_tensors
from dsv4_bench.probes.limits import Limits, judged
from dsv4_bench.probes.metrics import masks_differ, relative_error, rows_of, tensor_and_row_error
from dsv4_bench.probes.poison import poisoned_run
from dsv4_bench.probes.signatures import Signature

Function = Callable[..., Any]
_ANY = float("inf")  # the error of what cannot be compared


@dataclass
class Broken:
    """One output over its limit, or one promise broken; `signature` if it is plain what is wrong.

    An infinite error stands for what cannot be compared.
    """

    output: str
    error: float
    limit: float
    signature: Signature | None = None


@dataclass
class Verdict:
    """What one implementation did on one call: its outputs and everything wrong with them.

    error, limit: of the worst output. runs: outputs of further runs on the same inputs.
    """

    outputs: dict[str, Tensor]
    broken: list[Broken] = field(default_factory=list)
    error: float = 0.0
    limit: float = 0.0
    runs: list[dict[str, Tensor]] = field(default_factory=list)


# ------------------------------------------------------------------------------ contract


def attempt(call: Captured, function: Function) -> tuple[dict[str, Tensor], Signature | None]:
    """Outputs of `function` on copies of the call's inputs, or what it raised."""
    inputs = call.inputs
    tensors = {
        n: v for n, v in inputs.items() if isinstance(v, Tensor) and n not in call.site.params
    }
    try:
        return call.call(function, {**inputs, **clone_tensors(tensors)}), None
    except Exception as error:  # of somebody's kernel: it may raise anything
        return {}, raised(error)


def raised(error: Exception) -> Signature:
    """What an exception says; a product of matrices that fits when one is transposed is `transposed`."""
    text = " ".join(str(error).split())[:200]
    detail = f"raises {type(error).__name__}: {text}"
    found = re.search(r"\b(\d+)x(\d+) and (\d+)x(\d+)\b", text)
    if found:
        _, inner, rows, columns = found.groups()
        if inner == columns != rows:
            return Signature("transposed", f"{detail}; the second matrix is transposed")
    return Signature("unexplained", detail)


def broken_contract(call: Captured, outputs: dict[str, Tensor]) -> list[Broken]:
    """Outputs that are missing, or of another shape or dtype than the reference's."""
    found = []
    for name, right in call.outputs.items():
        ours = outputs.get(name)
        if not isinstance(ours, Tensor):
            what = "missing" if ours is None else f"a {type(ours).__name__}"
            found.append(Broken(name, _ANY, 0.0, Signature("unexplained", f"{name} is {what}")))
        elif ours.shape != right.shape:
            found.append(Broken(name, _ANY, 0.0, _wrong_shape(call, name, ours, right)))
        elif ours.dtype != right.dtype:
            words = f"{name} is {_short(ours.dtype)}, should be {_short(right.dtype)}"
            found.append(Broken(name, _ANY, 0.0, Signature("unexplained", words)))
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong_shape(call: Captured, name: str, ours: Tensor, right: Tensor) -> Signature:
    """The kind of a wrong shape: axes exchanged, another side of the weight, rows or columns cut."""
    a, b = list(ours.shape), list(right.shape)
    detail = f"{name} is {a}, should be {b}"
    if a != b and sorted(a) == sorted(b):
        return Signature("transposed", f"{detail}: axes are exchanged")
    if len(a) != len(b) or a[:-1] != b[:-1]:
        kind = "rows" if a[1:] == b[1:] and a[0] < b[0] else "unexplained"
        return Signature(kind, detail)
    for weight in call.inputs.values():
        if not isinstance(weight, Weight):
            continue
        n, k = weight.shape
        if a[-1] != n and a[-1] in (k, k // 2):
            packed = " / 2" if a[-1] == k // 2 else ""
            words = f"{detail}: the weight is {[n, k]}, K{packed} is taken for N"
            return Signature("transposed", words)
    return Signature("columns" if a[-1] < b[-1] else "unexplained", detail)


# ------------------------------------------------------------------------------ values


def in_one_order(spec: OpSpec, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` with discrete outputs sorted along the last axis, and with them the outputs of their
    shape: routing weights follow their experts."""
    result = dict(values)
    for name in spec.discrete:
        picked = values.get(name)
        if picked is None:
            continue
        order = picked.argsort(dim=-1, stable=True)
        for other, value in values.items():
            if value.shape == picked.shape:
                result[other] = value.gather(-1, order)
    return result


def judge_values(
    call: Captured,
    outputs: dict[str, Tensor],
    truth: dict[str, Tensor],
    limits: Limits,
    slack: float = 1.0,
) -> Verdict:
    """Every output against its float64 truth; decisions as sets, with the noise a score may have.

    Limits are taken times `slack`.
    """
    spec = call.site.spec
    verdict = Verdict(outputs)
    ours, exact = in_one_order(spec, outputs), in_one_order(spec, truth)
    excused = None
    for name in spec.discrete:
        broken, rows = _judge_decision(call, name, ours[name], exact[name], truth, limits)
        excused = rows if excused is None else excused | rows
        if broken is not None:
            verdict.broken.append(broken)
    for name, right in exact.items():
        if not judged(call, name, right):
            continue
        value = ours[name]
        if excused is not None and right.shape == exact[spec.discrete[0]].shape:
            value = torch.where(excused[:, None], right.to(value.dtype), value)
        bounds = limits.of(call.site.op, name, len(right))
        limit, row_limit = (slack * bound for bound in bounds)
        error, row = tensor_and_row_error(value, right)
        if error / limit >= verdict.error / (verdict.limit or 1.0):
            verdict.error, verdict.limit = error, limit
        if bool(masks_differ(value, right).any()):  # the most telling of all
            verdict.broken.insert(0, Broken(name, max(error, row), limit))
        elif error > limit or row > row_limit:
            verdict.broken.append(Broken(name, max(error, row), limit))
    return verdict


def _judge_decision(
    call: Captured,
    name: str,
    ours: Tensor,
    exact: Tensor,
    truth: dict[str, Tensor],
    limits: Limits,
) -> tuple[Broken | None, Tensor]:
    """A broken decision, if any, and the rows [n] whose set differs at all."""
    differ = (ours != exact).any(-1)
    if not bool(differ.any()):
        return None, differ
    scores, noise = decision_scores(call, truth, limits)
    wrong = differ & ~(spread(ours, exact, scores) <= noise)
    if not bool(wrong.any()):
        return None, differ
    count = int(max(ours.max(), exact.max())) + 1
    a, b = members(ours[wrong], count), members(exact[wrong], count)
    overlap = float((a & b).sum() / b.sum().clamp(min=1))
    share, row = float(wrong.double().mean()), int(wrong.nonzero()[0])
    words = f"{name} picks another set in {share:.1%} of the rows (first row {row}), {overlap:.0%} of it right"
    return Broken(name, share, 0.0, Signature("decision_flip", words)), differ


def decision_scores(
    call: Captured, truth: dict[str, Tensor], limits: Limits
) -> tuple[Tensor | None, Tensor | float]:
    """(scores [n, options] an op ranked by, how far [n] two of them may be apart and still be a tie).

    None where a table decides. Scores that were given leave no room; those that the op computes
    have the noise of their limit.
    """
    inputs = call.inputs
    if call.site.op == "index_topk":
        return inputs["score"], 0.0
    if call.site.op != "gate" or inputs["tid2eid"] is not None:
        return None, 0.0
    scores = truth["scores"]
    noise = limits.of("gate", "scores")[1] * scores.norm(dim=1)
    return scores + (0.0 if inputs["bias"] is None else inputs["bias"].double()), noise


# ------------------------------------------------------------------------------ memory


def judge_memory(
    call: Captured,
    function: Function,
    verdict: Verdict,
    limits: Limits,
    repeats: int,
    poison: bool,
) -> None:
    """Run `function` again, on poisoned memory and as before: the bits may not change.

    Adds to `verdict` what does; `repeats` counts the plain runs, the first one included. Off the CPU
    runs may differ within the limit: atomic additions come in any order.
    """
    again = _again(call, function, verdict, limits, repeats)
    if again is not None:
        verdict.broken.insert(0, again)
        return
    if not poison:
        return
    try:
        run = poisoned_run(call, function)
    except Exception as error:
        words = f"on poisoned memory it {raised(error).detail}"
        verdict.broken.insert(0, Broken("", _ANY, 0.0, Signature("padding", words)))
        return
    for name in run.touched:
        written = name in call.site.spec.mutates
        what = f"writes past the end of {name}" if written else f"writes into its argument {name}"
        verdict.broken.append(Broken(name, _ANY, 0.0, Signature("padding", what)))
    moved = _moved_output(call, verdict.outputs, run.outputs, limits)
    if moved is not None:
        verdict.runs.append(run.outputs)
        evidence = _poison_evidence(call, function, verdict, moved)
        uninitialised = evidence.signature is not None and evidence.signature.kind != "padding"
        verdict.broken.insert(0 if uninitialised else len(verdict.broken), evidence)


def _again(
    call: Captured, function: Function, verdict: Verdict, limits: Limits, repeats: int
) -> Broken | None:
    for _ in range(repeats - 1):
        outputs, problem = attempt(call, function)
        if problem is not None:
            words = f"{problem.detail}, in one of {repeats} runs"
            return Broken("", _ANY, 0.0, Signature("nondeterministic", words))
        name = _moved_output(call, verdict.outputs, outputs, limits)
        if name is not None:
            verdict.runs.append(outputs)
            error = _distance(outputs[name], verdict.outputs[name])
            words = f"{name} differs by {error:.2g} between two runs on the same inputs"
            return Broken(name, error, 0.0, Signature("nondeterministic", words))
    return None


def _moved_output(
    call: Captured, before: dict[str, Tensor], after: dict[str, Tensor], limits: Limits
) -> str | None:
    """The first output whose bits differ between two runs; off the CPU, by more than the limit."""
    for name in changed_outputs(before, after):
        error = _distance(after[name], before[name])
        if before[name].is_cpu or error > limits.of(call.site.op, name)[0]:
            return name
    return None


def _distance(a: Tensor, b: Tensor) -> float:
    return _ANY if a.shape != b.shape or bool(masks_differ(a, b).any()) else relative_error(a, b)


def changed_outputs(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Outputs whose bits differ."""
    missing = torch.empty(0)
    return [n for n, value in before.items() if not bits_equal(value, after.get(n, missing))]


def _poison_evidence(call: Captured, function: Function, verdict: Verdict, name: str) -> Broken:
    """Which poison it was that changed output `name`, and where."""
    first, second = verdict.outputs[name], verdict.runs[-1][name]
    differs = rows_of((first != second) & ~(first.isnan() & second.isnan())).any(1)
    where = f"in {int(differs.sum())} of {len(differs)} rows, first row {int(differs.nonzero()[0])}"
    sources = {
        "guards": ("padding", f"{name} depends on memory outside its arguments {where}"),
        "memory": ("nondeterministic", f"{name} holds uninitialised memory {where}"),
        "rows": ("padding", f"{name} depends on rows that no index names, {where}"),
    }
    for source, (kind, words) in sources.items():
        memory, rows = source == "memory", source == "rows"
        try:
            outputs = poisoned_run(call, function, memory=memory, rows=rows).outputs
        except Exception as error:
            return Broken(name, _ANY, 0.0, Signature(kind, f"{words}; {raised(error).detail}"))
        if changed_outputs(verdict.outputs, {**verdict.outputs, name: outputs[name]}):
            return Broken(name, _distance(second, first), 0.0, Signature(kind, words))
    words = f"{name} differs on poisoned memory {where}"
    return Broken(name, _distance(second, first), 0.0, Signature("nondeterministic", words))
