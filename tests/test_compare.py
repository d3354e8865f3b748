"""Comparing two tensors: numbers, places, and that NaN never passes."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.probes.compare import bits_equal, compare
from dsv4_bench.probes.stats import first_nonfinite, tensor_stats

NAN, INF = float("nan"), float("inf")


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_numbers_and_coordinate():
    theirs = torch.zeros(3, 4)
    theirs[0, 0] = 3.0
    ours = theirs.clone()
    ours[2, 1] = 0.5
    found = compare("y", ours, theirs, 0.1)
    assert found.relative_l2 == pytest.approx(0.5 / 3)
    assert (found.max_abs, found.coordinate, found.ours, found.theirs) == (0.5, [2, 1], 0.5, 0.0)
    assert (found.verdict, found.bits_equal, found.masks_equal) == ("over", False, True)
    assert compare("y", ours, theirs, 0.2).verdict == "ok"


def test_equal_is_zero_and_a_sign_of_zero_is_other_bits():
    assert compare("y", tensor(1.0), tensor(1.0), 0.0).verdict == "ok"
    found = compare("y", tensor(0.0), tensor(-0.0), 0.0)
    assert (found.relative_l2, found.bits_equal) == (0.0, False)


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [
        ((1, NAN), (1, 2), 1),
        ((1, 2), (NAN, 2), 0),
        ((1, INF), (1, -INF), 1),
        ((NAN, 1), (INF, 1), 0),
    ],
)
def test_different_nonfinite_values_never_pass(ours, theirs, at):
    found = compare("y", tensor(*ours), tensor(*theirs), 1e9)
    assert (found.verdict, found.relative_l2, found.coordinate) == ("over", INF, [at])
    assert not found.masks_equal


def test_the_same_nonfinite_values_are_equal():
    found = compare("y", tensor(NAN, INF, -INF, 1), tensor(NAN, INF, -INF, 1), 0.0)
    assert (found.verdict, found.relative_l2) == ("ok", 0.0)


def test_shapes_must_be_equal_and_empty_is_fine():
    assert compare("y", torch.zeros(2), torch.zeros(3), 1e9).verdict == "over"
    assert compare("y", torch.zeros(0, 4), torch.zeros(0, 4), 0.0).verdict == "ok"


def test_discrete_outputs_are_compared_as_sets():
    theirs = torch.tensor([[1, 2, 3], [4, 5, -1]])
    assert compare("i", theirs.flip(1), theirs, 0.5, discrete=True).relative_l2 == 0
    found = compare("i", torch.tensor([[3, 2, 1], [4, 6, -1]]), theirs, 0.5, discrete=True)
    assert (found.relative_l2, found.coordinate, found.verdict) == (0.5, [1], "over")
    assert (found.ours, found.theirs) == (6.0, 5.0)
    flat = compare("i", torch.tensor([1, 2]), torch.tensor([2, 1]), 0.0, discrete=True)
    assert flat.verdict == "ok"


def test_bits():
    assert bits_equal(tensor(NAN, 1), tensor(NAN, 1))
    assert bits_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert not bits_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert bits_equal(torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous())


def test_one_wrong_row_is_over_its_own_limit():
    theirs = torch.ones(10_000, 2)
    ours = theirs.clone()
    ours[77] *= 1.01
    found = compare("y", ours, theirs, limit=1e-3, row_limit=1e-3)
    assert found.relative_l2 == pytest.approx(1e-4) and found.row_error == pytest.approx(0.01)
    assert (found.verdict, found.worst) == ("over", (found.row_error, 1e-3))
    assert found.times == pytest.approx(10, rel=1e-3)
    assert found.to_dict()["worst"] == [found.row_error, 1e-3]
    assert compare("y", ours, theirs, limit=1e-3).verdict == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stats(dtype):
    stats = tensor_stats(tensor(3, -4, NAN, INF, -INF, 0, dtype=dtype).view(2, 3))
    assert (stats.finite, stats.nan, stats.inf, stats.abs_max) == (3, 1, 2, 4.0)
    assert stats.rms == pytest.approx((25 / 3) ** 0.5) and stats.mean == pytest.approx(-1 / 3)


def test_stats_at_the_edges():
    assert tensor_stats(torch.zeros(3, dtype=torch.int64)) is None
    assert tensor_stats(torch.zeros(0)).finite == 0
    assert tensor_stats(tensor(NAN, NAN)).nan == 2
    large = tensor_stats(torch.full((4,), 3e38))
    assert (large.finite, large.inf) == (4, 0) and large.rms == pytest.approx(3e38)


def test_first_nonfinite():
    values = torch.zeros(2, 3, 4)
    assert first_nonfinite(values) is None
    values[1, 2, 0] = INF
    values[1, 0, 3] = NAN
    assert first_nonfinite(values) == [1, 0, 3]
