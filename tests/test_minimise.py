"""`check --minimise`: the smallest set that breaks, pairs and triples included, resumable, and at a known cost"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, Plant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import (
    parse_route,
    reference,
)
from dsv4_bench.workbench.checking import layerwise, trial_store
from dsv4_bench.workbench.checking.calibration import LogitsError, logits_error
from dsv4_bench.workbench.checking.ddmin import ddmin, expected_trials
from dsv4_bench.workbench.checking.minimising import Minimised, minimise
from dsv4_bench.workbench.checking.symptoms import Outcome, Says
from dsv4_bench.workbench.checking.trial_store import TrialStore
from dsv4_bench.workbench.checking.trials import Snapshots, Trials

# ------------------------------------------------------------------------------ ddmin

UNITS = st.integers(min_value=1, max_value=40)


@given(st.data(), UNITS)
@settings(max_examples=150, deadline=None)
def test_ddmin_finds_a_planted_set(data: st.DataObject, count: int) -> None:
    """What breaks is any superset of a planted set; no planted set may hold another."""
    sets = data.draw(
        st.lists(st.frozensets(st.integers(0, count - 1), min_size=1, max_size=4), min_size=1)
    )
    found = ddmin(range(count), lambda part: any(s <= set(part) for s in sets))
    minimal = [s for s in sets if not any(other < s for other in sets)]
    assert frozenset(found) in minimal
    assert found == sorted(found)


@given(st.data(), st.integers(min_value=1, max_value=12))
@settings(max_examples=150, deadline=None)
def test_ddmin_is_1_minimal_for_any_predicate(data: st.DataObject, count: int) -> None:
    """Even where a larger set may be fine although a smaller one breaks."""
    answers: dict[frozenset[int], bool] = {frozenset(range(count)): True, frozenset(): False}

    def breaks(part: list[int]) -> bool:
        key = frozenset(part)
        if key not in answers:
            answers[key] = data.draw(st.booleans())
        return answers[key]

    found = ddmin(range(count), breaks)
    assert breaks(found)
    for unit in found if len(found) > 1 else []:
        assert not breaks([other for other in found if other != unit])


def test_ddmin_halves() -> None:
    for culprit in (0, 200, 511):
        asked: list[list[int]] = []

        def breaks(part: list[int], culprit: int = culprit, asked: Any = asked) -> bool:
            asked.append(part)
            return culprit in part

        assert ddmin(range(512), breaks) == [culprit]
        assert len(asked) <= expected_trials(512) == 18


def test_ddmin_tries_the_cheapest_first() -> None:
    asked: list[list[int]] = []

    def breaks(part: list[int]) -> bool:
        asked.append(part)
        return 7 in part

    assert ddmin(range(8), breaks, cost=lambda part: -part[0]) == [7]
    assert asked == [[4, 5, 6, 7], [6, 7], [7]]


def test_ddmin_does_not_ask_for_a_half_as_the_rest_of_the_other() -> None:
    asked: list[list[int]] = []

    def breaks(part: list[int]) -> bool:
        asked.append(part)
        return {0, 3} <= set(part)

    assert ddmin(range(4), breaks) == [0, 3]
    assert asked[:2] == [[0, 1], [2, 3]] and len(asked[2]) == 1


# ------------------------------------------------------------------------------ planted faults

TOKENS = torch.randint(2, 300, (48,), generator=torch.Generator().manual_seed(3)).tolist()
CHUNKS = (46, 1)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return Checkpoint(
        make_checkpoint("nvfp4", replace(SMALL, num_hidden_layers=3, compress_ratios=(0, 4, 0)))
    )


@pytest.fixture
def model(checkpoint: Checkpoint) -> Transformer:
    return Transformer(checkpoint)


def trials_of(model: Transformer, *route: str) -> Trials:
    steps = layerwise.forward_calls(model, [TOKENS], [CHUNKS])
    return Trials(model, parse_route(["kernel", *route]), steps)


def off_by_a_thousandth(op: str) -> Callable[..., Any]:
    def bug(*args: Any, **params: Any) -> Any:
        result = reference(op)(*args, **params)
        return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result * 1.001

    return bug


def only_together(model: Transformer, *paths: str) -> Callable[[str], Callable[..., Any]]:
    """Implementations that are right unless all of `paths` are on them: a hidden layout between
    kernels. The one that runs last, of them all, then swaps the halves of its output."""

    def together() -> bool:
        return all(model.sites[path].impl.name == "bug" for path in paths)

    def make(op: str) -> Callable[..., Any]:
        def bug(*args: Any, **params: Any) -> Any:
            result = reference(op)(*args, **params)
            value = result[0] if isinstance(result, tuple) else result
            if op == model.sites[paths[-1]].op and together():
                value = value.roll(value.shape[-1] // 2, -1)
            return (value, *result[1:]) if isinstance(result, tuple) else value

        return bug

    return make


def test_an_honest_route_is_clean(model: Transformer) -> None:
    result = minimise(trials_of(model))
    assert (result.status, result.sets, result.trials) == ("clean", [], 1)
    assert all(site.impl.name == "reference" for site in model.sites.values())  # as before


def test_a_single_site(model: Transformer, plant: Plant) -> None:
    plant("rms_norm", off_by_a_thousandth("rms_norm"))
    result = minimise(trials_of(model, "L1/attn/kv_norm=bug"))
    assert [culprits.sites for culprits in result.sets] == [("L1/attn/kv_norm",)]
    culprits = result.sets[0]
    assert culprits.confirmed and not culprits.elsewhere and culprits.subsets == ()
    assert culprits.sentence.startswith("L1/attn/kv_norm alone breaks the output")
    assert result.trials <= expected_trials(25) + expected_trials(5) + expected_trials(12) + 4


def test_an_op_that_is_wrong_everywhere_and_another_fault(model: Transformer, plant: Plant) -> None:
    plant("hc_post", off_by_a_thousandth("hc_post"))
    plant("experts", off_by_a_thousandth("experts"))
    result = minimise(trials_of(model, "*/hc_post=bug", "L2/ffn/experts=bug"))
    by_op = {culprits.ops: culprits for culprits in result.sets}
    assert set(by_op) == {("hc_post",), ("experts",)}
    assert by_op["hc_post",].elsewhere and not by_op["experts",].elsewhere
    assert by_op["experts",].sites == ("L2/ffn/experts",)
    assert result.complete


@pytest.mark.parametrize(
    "paths",
    [
        ("L0/attn/q_rope", "L0/attn/core"),
        ("L0/ffn/gate", "L2/ffn/experts"),
        ("L0/attn/norm", "L1/attn/wq_b", "L2/attn/hc_post"),
    ],
)
def test_a_fault_of_several_kernels_together(
    model: Transformer, plant: Plant, paths: tuple[str, ...]
) -> None:
    make = only_together(model, *paths)
    for path in paths:
        plant(model.sites[path].op, make(model.sites[path].op))
    result = minimise(trials_of(model, *(f"{path}=bug" for path in paths)))
    (culprits,) = result.sets
    assert culprits.sites == paths
    parts = [sites for sites, _ in culprits.subsets]
    assert parts == [
        part for size in range(1, len(paths)) for part in itertools.combinations(paths, size)
    ]
    assert not any(outcome.broken for _, outcome in culprits.subsets)
    assert "only together" in culprits.sentence and "each alone is fine" in culprits.sentence
    assert culprits.confirmed


def test_a_kernel_that_raises_is_as_broken_as_can_be(model: Transformer, plant: Plant) -> None:
    def bug(*args: Any, **params: Any) -> Any:
        raise RuntimeError("launch failed")

    plant("moe_sum", bug)
    result = minimise(trials_of(model, "L1/ffn/sum=bug"))
    assert [culprits.sites for culprits in result.sets] == [("L1/ffn/sum",)]
    assert result.sets[0].outcome.raised == "RuntimeError: launch failed"
    assert "launch failed" in result.sets[0].sentence


def test_kernels_with_state_run_from_the_start(model: Transformer, plant: Plant) -> None:
    """One that gives back, from the second layer on, what it gave before: a buffer not waited for."""
    last: list[Tensor] = []

    def stale(x: Tensor, **params: Any) -> Tensor:
        y = reference("rms_norm")(x, **params)
        last.append(y)
        return last[-2] if len(last) > 1 and last[-2].shape == y.shape else y

    plant("rms_norm", stale)
    trials = trials_of(model, "*/ffn/norm=bug")
    result = minimise(trials)
    assert not trials.reuse
    assert result.status == "found" and result.notes


def test_a_route_of_references_cannot_be_minimised(model: Transformer) -> None:
    with pytest.raises(CannotAnswer, match="reference everywhere"):
        minimise(trials_of(model, "reference"))


# ------------------------------------------------------------------------------ trials


def test_a_trial_from_a_snapshot_has_the_bits_of_a_plain_run(model: Transformer) -> None:
    trials = trials_of(model)
    nothing: frozenset[str] = frozenset()
    trials.run(nothing)
    on = frozenset(path for path in trials.sites if path.startswith("L2/") or path == "L1/ffn/gate")
    assert trials.start(on) == 2  # embed is part 0, L1 part 2
    ours = trials.run(on)
    assert trials.start(on) == trials.parts - 1  # now known up to the head
    assert torch.equal(ours, trials.run_plainly(on))
    model.set_route(parse_route(["reference"]))
    layerwise.use(
        model, {p: (trials.kernels if p in on else trials.references)[p] for p in model.sites}
    )
    assert torch.equal(ours, teacher_forced_logits(model, TOKENS, CHUNKS))


def test_cost_is_the_sum_of_what_will_run(model: Transformer) -> None:
    trials = trials_of(model)
    trials.run(frozenset())
    trials.reference_seconds = dict.fromkeys(model.sites, 1.0)
    trials.kernel_seconds = dict.fromkeys(model.sites, 0.25)
    on = frozenset({"L2/ffn/gate"})
    later = [site for site in model.sites.values() if site.layer == 2 or site.path[:4] == "head"]
    assert trials.cost(on) == len(later) - 0.75


def test_snapshots_stay_within_their_room() -> None:
    one = [torch.zeros(256)]  # 1 kB
    snapshots = Snapshots(4096)
    for part in range(1, 4):
        snapshots.keep(part, frozenset(), one)  # two may be pinned
    for name in "abc":
        snapshots.keep(1, frozenset(name), one)
    assert [snapshots.has(part, frozenset()) for part in (1, 2, 3)] == [True, True, False]
    assert [snapshots.has(1, frozenset(name)) for name in "abc"] == [False, True, True]
    snapshots.keep(9, frozenset("z"), [torch.zeros(4096)])
    assert not snapshots.has(9, frozenset("z"))


# ------------------------------------------------------------------------------ resuming


def test_an_interrupted_search_goes_on(
    model: Transformer, plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Somebody may be editing the engine while the tests run; that would be another run.
    monkeypatch.setattr(trial_store, "_source_files", lambda implementations: [])
    plant("rms_norm", off_by_a_thousandth("rms_norm"))

    def search(folder: Path | None, stop_at: int | None = None) -> Minimised:
        calls = iter(range(1000))

        def progress(text: str, done: float, total: float) -> None:
            if "trial" in text and next(calls) == stop_at:
                raise KeyboardInterrupt

        return minimise(trials_of(model, "L1/attn/kv_norm=bug"), "logits", folder, progress)

    whole = search(None)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, stop_at=6)
    assert all(site.impl.name == "reference" for site in model.sites.values())
    (file,) = tmp_path.glob("*/trials.jsonl")
    done = len(file.read_text().splitlines())
    with file.open("a") as stream:
        stream.write('{"set": "abc", "bro')  # killed in the middle of a line
    resumed = search(tmp_path)
    assert done > 0 and resumed.trials == whole.trials - done
    assert resumed.sets[0].sites == whole.sets[0].sites
    again = search(tmp_path)
    assert again.trials == 0 and again.sets[0].confirmed


def test_the_store_survives_a_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = TrialStore(tmp_path / "file" / "run")
    outcome = Outcome(True, LogitsError(1.0, 2.0, 3, 4), 0.5, "")
    store.put(frozenset("a"), outcome)
    assert store.problem is not None and store.get(frozenset("a")) == outcome


def test_other_code_is_another_run(model: Transformer, plant: Plant, tmp_path: Path) -> None:
    def keys() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    plant("moe_sum", lambda *a, **p: reference("moe_sum")(*a, **p))
    minimise(trials_of(model, "L0/ffn/sum=bug"), "logits", tmp_path)
    first = keys()
    plant("moe_sum", lambda *a, **p: reference("moe_sum")(*a, **p) + 0)
    minimise(trials_of(model, "L0/ffn/sum=bug"), "logits", tmp_path)
    assert len(first) == 1 and len(keys()) == 2


def test_an_edit_beside_the_kernel_is_another_run(
    model: Transformer, plant: Plant, tmp_path: Path
) -> None:
    """The kernel's own code is the same; a function it calls is not."""
    file = tmp_path / "plugin.py"
    kernel = "def kernel(routed, shared, *, dtype):\n    return scaled(routed + shared)\n"

    def key(helper: str) -> tuple[str, str]:
        file.write_text(kernel + helper)
        linecache.checkcache(str(file))
        space: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), space)
        plant("moe_sum", space["kernel"])
        trials = trials_of(model, "L0/ffn/sum=bug")
        chosen = {"L0/ffn/sum": trials.kernels["L0/ffn/sum"]}
        return chosen["L0/ffn/sum"].hash, trial_store.run_key(model, chosen, trials.steps, "x")

    first = key("def scaled(x):\n    return x\n")
    edited = key("def scaled(x):\n    return 2 * x\n")
    assert first[0] == edited[0] and first[1] != edited[1]


# ------------------------------------------------------------------------------ symptoms


def test_what_the_model_says() -> None:
    logits = torch.zeros(4, 5)
    for row, token in enumerate((3, 1, 4, 2)):
        logits[row, token] = 1.0
    none = LogitsError(0.0, 0.0, 0, 0)
    says = Says(ids=(1, 4), first=1, text="one four", wanted=True)
    assert not says.shows(logits, none)
    assert replace(says, wanted=False).shows(logits, none)
    assert replace(says, ids=(1, 3)).shows(logits, none)
    logits[2, 0] = torch.nan
    assert says.shows(logits, none)  # NaN says nothing


def test_logits_error_by_hand() -> None:
    reference_logits = torch.tensor([[3.0, 0.0, 4.0], [0.0, 5.0, 0.0]])
    logits = torch.tensor([[4.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    found = logits_error(logits, reference_logits)
    assert found.error == pytest.approx(2**0.5 / 50**0.5)
    assert found.row_error == pytest.approx(2**0.5 / 5)
    assert (found.masks, found.top1) == (0, 1)
    assert (
        logits_error(logits, reference_logits, logit_move=0.5).top1 == 0
    )  # a lead of 1 is no lead
    logits[1, 0] = torch.nan
    assert logits_error(logits, reference_logits).masks == 1
