"""Error maps: cells are the worst place of their block, and say where it is."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.error_map import Area, error_map

INF = float("inf")


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = torch.ones(shape)
    return theirs.clone(), theirs


def test_a_cell_holds_the_worst_of_its_block_and_its_place():
    ours, theirs = pair(6, 2, 5)
    ours[4, 1, 4] += 0.5  # row 4, column 9
    ours[5, 1, 3] += 0.25  # row 5, column 8: in the same cell
    found = error_map(ours, theirs, height=3, width=2)
    assert found.block == (2, 8) and found.rms == 1
    assert found.error == [[0, 0], [0, 0], [0, 0.5]]
    assert found.at[2][1] == (4, 9)
    assert (found.ours[2][1], found.theirs[2][1]) == (1.5, 1.0)
    assert found.shape == [6, 2, 5]


def test_every_place_is_covered_once_whatever_the_size():
    """The largest of all cells is the largest of all places, for every single place."""
    theirs = torch.full((7, 11), 2.0)
    for row in range(7):
        for column in range(11):
            ours = theirs.clone()
            ours[row, column] = 3.0
            found = error_map(ours, theirs, height=3, width=4)
            assert found.block == (4, 4)
            assert [len(found.error), len(found.error[0])] == [2, 3]
            hit = [(r, c) for r in range(2) for c in range(3) if found.error[r][c]]
            assert hit == [(row // 4, column // 4)]
            assert found.error[hit[0][0]][hit[0][1]] == pytest.approx(0.5)
            assert found.at[hit[0][0]][hit[0][1]] == (row, column)


def test_zooming_in():
    ours, theirs = pair(100, 100)
    ours[50, 60] = 2.0
    found = error_map(ours, theirs, 10, 10, Area(45, 55, 58, 68))
    assert found.block == (1, 1)
    assert found.error[5][2] == 1 and found.at[5][2] == (50, 60)
    assert sum(map(sum, found.error)) == 1


def test_nonfinite_values():
    ours, theirs = pair(2, 4)
    ours[0, 0] = torch.nan  # only ours
    theirs[0, 1] = torch.inf  # only theirs
    ours[1, 0] = theirs[1, 0] = torch.inf  # both, alike
    ours[1, 1], theirs[1, 1] = torch.inf, -torch.inf  # both, not alike
    found = error_map(ours, theirs, 2, 4)
    assert found.error == [[INF, INF, 0, 0], [0, INF, 0, 0]]
    assert found.rms == 1


def test_sets_vectors_and_scalars():
    ours, theirs = torch.tensor([[1, 2, 3], [4, 5, 9]]), torch.tensor([[3, 2, 1], [4, 5, 6]])
    assert error_map(ours, theirs, 2, 3).error == [[0, 0, 0], [0, 0, 1]]
    assert error_map(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), 9, 9).error == [[0], [2]]
    assert error_map(torch.tensor(1.0), torch.tensor(1.0), 1, 1).error == [[0]]


def test_all_zero_truth_is_measured_absolutely():
    assert error_map(torch.tensor([[0.5]]), torch.zeros(1, 1), 1, 1).error == [[0.5]]


@pytest.mark.parametrize("area", [Area(0, 9, 0, 1), Area(1, 1, 0, 1), Area(-1, 1, 0, 1)])
def test_areas_outside_are_refused(area):
    with pytest.raises(DSV4Error, match="is not in 8 rows x 1 columns"):
        error_map(*pair(8), 1, 1, area)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(DSV4Error, match="shapes differ"):
        error_map(torch.zeros(2), torch.zeros(3), 1, 1)
    with pytest.raises(DSV4Error, match="empty"):
        error_map(torch.zeros(0, 2), torch.zeros(0, 2), 1, 1)
    with pytest.raises(DSV4Error, match="cells"):
        error_map(*pair(2, 2), 1000, 1000)
