"""Signatures on constructed differences: each is recognised, honest rounding is not, words say where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_bench.probes.metrics import measure, relative_error, ulp_histogram
from dsv4_bench.probes.signatures import Difference, classify

SHAPES = [(24, 4, 32), (40, 64), (12, 6, 6)]


def truth_of(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def noisy(x: Tensor) -> Tensor:
    """What a float32 kernel would give for x."""
    return x.float().double()


def classified(ours: Tensor, truth: Tensor, **fields: Any) -> str:
    return classify(Difference("y", noisy(ours), truth, 1e-6, **fields)).kind


def _swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


def _scale_row(x: Tensor) -> Tensor:
    y = x.clone()
    y[3] *= 0.25
    return y


def _scale_first_half(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., : x.shape[-1] // 2] *= 2
    return y


def _wrong(part: Any) -> Any:
    def change(x: Tensor) -> Tensor:
        y = x.clone()
        y[part] = truth_of(tuple(y[part].shape), 99)
        return y

    return change


def _zero(part: Any) -> Any:
    def change(x: Tensor) -> Tensor:
        y = x.clone()
        y[part] = 0
        return y

    return change


def _shifted_in(x: Tensor) -> Tensor:
    """Row i holds row i - 1; row 0 holds something from outside."""
    return torch.cat((truth_of((1, *x.shape[1:]), 98), x[:-1]))


def _one_nan(x: Tensor) -> Tensor:
    y = x.clone()
    y[2, 0] = torch.nan
    return y


CHANGES = {
    "factor": ("constant_factor", lambda x: 1.001 * x),
    "negated": ("constant_factor", lambda x: -x),
    "row factor": ("constant_factor", _scale_row),
    "half factor": ("constant_factor", _scale_first_half),
    "halves": ("halves_swapped", _swap_halves),
    "pairs": ("nibbles", lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
    "row shift": ("shifted", lambda x: x.roll(1, 0)),
    "row shift, other edge": ("shifted", _shifted_in),
    "column shift": ("shifted", lambda x: x.roll(-1, -1)),
    "rows in another order": ("permuted", lambda x: x[torch.arange(len(x)).flip(0)]),
    "clamp": ("saturated", lambda x: x.clamp(-1, 1)),
    "clamp above": ("saturated", lambda x: x.clamp(max=0.7)),
    "small to zero": ("flushed", lambda x: torch.where(x.abs() < 0.1, 0.0, x)),
    "relu": ("flushed", torch.relu),
    "all zero": ("flushed", lambda x: 0 * x),
    "rows": ("rows", _wrong(slice(5, 8))),
    "zero rows": ("rows", _zero(slice(-2, None))),
    "columns": ("columns", _wrong((..., slice(0, 2)))),
    "a tile": ("tiles", _wrong((slice(2, 6), ..., slice(1, 3)))),
    "nan": ("nan", _one_nan),
    "infinite": ("nan", lambda x: torch.where(x > 1.5, torch.inf, x)),
    "bfloat16": ("unexplained", lambda x: x.bfloat16().double()),
    "something else": ("unexplained", lambda x: truth_of(tuple(x.shape), 97)),
}


@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_signature_is_recognised(shape: tuple[int, ...], name: str) -> None:
    kind, change = CHANGES[name]
    for seed in range(3):
        truth = truth_of(shape, seed)
        assert classified(change(truth), truth) == kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_square_and_mixed_up_axes_are_transposed(shape: tuple[int, ...]) -> None:
    truth = truth_of(shape, 0)
    if shape[-1] == shape[-2]:
        assert classified(truth.transpose(-1, -2), truth) == "transposed"
    if len(shape) == 3:
        assert classified(truth.transpose(0, 1).reshape(shape), truth) == "transposed"
    else:
        assert classified(truth.T.reshape(shape), truth) == "transposed"


def test_late_rows_are_positions_only_if_rows_are_tokens() -> None:
    truth = truth_of((24, 4, 32), 0)
    late = _wrong(slice(20, None))(truth)
    assert classified(late, truth) == "rows"
    assert classified(late, truth, positions=torch.arange(100, 124)) == "positions"
    first = classify(Difference("y", late, truth, 1e-6, torch.arange(100, 124)))
    assert first.start == 120


def test_rows_are_named_by_what_they_have_in_common() -> None:
    truth = truth_of((24, 32), 0)
    short = torch.arange(24) < 7
    ours = torch.where(short[:, None], 0.0078 * truth, truth)
    groups = {"rows with fewer than 128 keys": short}
    found = classify(Difference("o", ours, truth, 1e-6, None, groups))
    assert found.detail == "o = 0.0078 x reference for rows with fewer than 128 keys"


def test_finite_where_hidden_is_due_is_not_nan() -> None:
    truth = truth_of((6, 8), 0)
    truth[:, 5:] = -torch.inf
    ours = truth.clone()
    ours[:, 5:] = 0.0
    assert classified(ours, truth) == "padding"


def test_measures_by_hand() -> None:
    truth = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    ours = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    seen = measure(ours, truth)
    assert seen["relative_l2"] == pytest.approx(1 / 5)
    assert (seen["max_abs"], seen["at"]) == (1.0, [1, 0])
    assert seen["worst_row"] == pytest.approx(1 / 4)
    assert seen["cosine"] == pytest.approx(25 / (26**0.5 * 5))
    assert seen["ulp"]["0"] == 3 and seen["mask_differences"] == 0
    ours[0, 0] = torch.nan
    assert measure(ours, truth)["mask_differences"] == 1


def test_ulp_histogram_by_hand() -> None:
    one = torch.tensor([1.0, 1.0, -1.0, 0.0])
    up = torch.tensor([1.0, 1.0 + 2**-23, -1.0 - 2**-22, -0.0])
    counts = ulp_histogram(up, one.double())
    assert counts == {"0": 2, "1": 1, "2": 1, "3-4": 0, "5-16": 0, "more": 0}


def test_relative_error_of_nothing_is_absolute() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


@pytest.mark.parametrize("shift", [3, 5, -7])
def test_any_constant_displacement_is_a_shift(shift: int) -> None:
    truth = torch.randn(12, 40, generator=torch.Generator().manual_seed(3)).double()
    found = classify(Difference("y", truth.roll(shift, 1), truth, 1e-6))
    assert (found.kind, found.detail) == ("shifted", f"y is shifted by {shift} columns")


def test_one_row_for_all() -> None:
    truth = torch.randn(9, 16, generator=torch.Generator().manual_seed(4)).double()
    found = classify(Difference("y", truth[2:3].expand(9, -1), truth, 1e-6))
    assert (found.kind, found.detail) == ("rows", "every row of y is the reference's row 2")
    other = torch.randn(1, 16, generator=torch.Generator().manual_seed(5)).double()
    assert (
        "none of the reference's"
        in classify(Difference("y", other.expand(9, -1), truth, 1e-6)).detail
    )
    same = truth[:1].expand(9, -1)
    assert classify(Difference("y", same * 0.5 + 0.1, same, 1e-6)).kind != "rows"
