"""The catalogue of faults: complete, documented, each wrong somewhere, none loaded unasked"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from test_imports import in_package, modules_after
from torch import Tensor

import dsv4_bench.engine.cpu
import dsv4_bench.probes.faults.catalogue  # noqa: F401
from dsv4_bench.engine import registry
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import load_config
from dsv4_bench.engine.demo import SHIPPED
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, matches, parse_route, reference
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.faults.base import (
    FAULTS,
    Fault,
    computed_by,
    fault,
    forget,
    registered_for_a_while,
    right,
    select_faults,
)
from dsv4_bench.probes.signatures import KINDS
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.checking.fault_suite import CHUNKS, LENGTH, SMALL, prompt
from dsv4_bench.workbench.loading import load_plugins, read_route

ALL = [pytest.param(f, id=name) for name, f in FAULTS.items()]
SINGLE = [pytest.param(f, id=n) for n, f in FAULTS.items() if not f.combination]
COMBINED = [pytest.param(f, id=n) for n, f in FAULTS.items() if f.combination]
TOKENS = prompt(LENGTH, SMALL.vocab_size)


def run_model(model: Transformer, observer: Any = None, chunks: tuple[int, ...] = CHUNKS) -> Tensor:
    """All logits of TOKENS in `chunks`, on the model's route."""
    cache, parts, start = model.new_cache(), [], 0
    set_taps(model.sites.values(), observer)
    try:
        for size in chunks:
            parts.append(model.forward(cache.step([TOKENS[start : start + size]]), cache))
            start += size
    finally:
        set_taps(model.sites.values(), None)
    return torch.cat(parts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Transformer]:
    """The small model that shows a fault, on the reference; one for each layout and preparation."""
    folder = tmp_path_factory.mktemp("faults")
    made: dict[Any, Transformer] = {}

    def get(fault: Fault) -> Transformer:
        key = (fault.layout, fault.prepare)
        if key not in made:
            path = folder / fault.layout
            if not path.exists():
                write_checkpoint(path, SMALL, fault.layout, seed=1)
            made[key] = Transformer(Checkpoint(path))
            if fault.prepare is not None:
                fault.prepare(made[key])
        return made[key]

    return get


@pytest.fixture(scope="module")
def captures(
    models: Callable[[Fault], Transformer],
) -> Callable[[Fault], list[Captured]]:
    """Every op of a reference run of that model."""
    kept: dict[int, list[Captured]] = {}

    def get(fault: Fault) -> list[Captured]:
        model = models(fault)
        if id(model) not in kept:
            capture = Capture()
            with torch.inference_mode():
                run_model(model, capture)
            kept[id(model)] = capture.calls
        return kept[id(model)]

    return get


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(a[n].shape == b[n].shape and a[n].equal(b[n]) for n in b)


# ------------------------------------------------------------------------------ the catalogue


def test_there_are_enough_of_them():
    scored = [f for f in FAULTS.values() if not f.knockout]
    assert len(scored) >= 60
    assert len([f for f in scored if f.combination]) >= 4
    assert {op for f in scored for op in f.parts} == set(registry.OPS)


@pytest.mark.parametrize("fault", ALL)
def test_a_fault_is_described(fault: Fault):
    assert fault.doc.endswith(".") and len(fault.doc) > 15
    assert fault.knockout or fault.source
    assert fault.kinds and set(fault.kinds) <= set(KINDS)
    assert len(fault.kinds) == 1 or fault.why, "more than one kind needs a reason"
    assert len(fault.parts) > 1 or fault.combination == (len(fault.sites) > 1)
    assert bool(fault.prepare) <= bool(fault.data)
    for op, function in fault.parts.items():
        assert IMPLEMENTATIONS[op][f"fault/{fault.name}"].function is function


@pytest.mark.parametrize("fault", ALL)
def test_its_sites_run_its_ops(fault: Fault, models: Callable[[Fault], Transformer]):
    sites = models(fault).sites.values()
    for glob in fault.sites:
        found = {site.op for site in sites if matches(site.path, glob)}
        assert found and found <= set(fault.parts), glob


def test_default_sites_fit_the_demo():
    demo = load_config(SHIPPED)
    assert demo.compress_ratios[:5] == SMALL.compress_ratios
    assert demo.num_hash_layers == SMALL.num_hash_layers


@pytest.mark.parametrize("fault", SINGLE)
def test_it_is_wrong_somewhere(fault: Fault, captures: Callable[[Fault], list[Captured]]):
    forget()
    model_sites = {call.site.path for call in captures(fault)}
    on = {path for path in model_sites if any(matches(path, glob) for glob in fault.sites)}
    calls = [call for call in captures(fault) if call.site.path in on]
    wrong = [c for c in calls if not same(c.run(fault.parts[c.site.op]), c.outputs)]
    forget()
    assert wrong, f"{fault.name} changes nothing at {sorted(on)}"


@pytest.mark.parametrize("fault", COMBINED)
def test_a_combination_is_right_alone_and_wrong_together(
    fault: Fault, models: Callable[[Fault], Transformer]
):
    model = models(fault)

    def logits(route: list[str]) -> Tensor:
        forget()
        model.set_route(parse_route(["reference", *route]))
        found = run_model(model, chunks=(130, 5, 1))
        forget()
        return found

    healthy = logits([])
    for entry in fault.route:
        torch.testing.assert_close(logits([entry]), healthy, rtol=0, atol=0)
    together = logits(fault.route)
    assert not together.equal(healthy)
    model.set_route(parse_route(["reference"]))


def test_a_fault_is_wrong_in_one_way_only():
    """What is not the bug is the reference's float32: undoing the bug gives the reference's bits."""
    y, x = torch.randn(6, 32), torch.randn(6, 4, 32)
    post, comb = torch.rand(6, 4), torch.rand(6, 4, 4)
    wrong = FAULTS["comb_transposed"].parts["hc_post"](y, x, post, comb.transpose(1, 2))
    assert wrong.equal(reference("hc_post")(y, x, post, comb))


# ------------------------------------------------------------------------------ the decorator


def passing(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Nothing is wrong."""
    return reference("hc_post")(y, x, post, comb)


def test_registration_says_what_is_missing():
    def undocumented(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return y

    with registered_for_a_while():
        fault(op="hc_post", sites="*/hc_post", kinds="rows")(passing)
        assert FAULTS["passing"].route == ["*/hc_post=fault/passing"]
        for arguments, function, message in (
            ({"kinds": "rows"}, passing, "'passing' exists"),
            ({"kinds": "rovs", "name": "other"}, passing, "unknown kind 'rovs'"),
            ({"kinds": "rows"}, undocumented, "no docstring"),
            ({"kinds": "rows", "op": "hc_pst", "name": "other"}, passing, "unknown op 'hc_pst'"),
        ):
            with pytest.raises(DSV4Error, match=message):
                fault(**{"op": "hc_post", "sites": "*/hc_post", **arguments})(function)
    assert "passing" not in FAULTS and "fault/passing" not in IMPLEMENTATIONS["hc_post"]


def test_selection_by_name_glob_and_family():
    assert [f.name for f in select_faults(["fault/sink_missing"])] == ["sink_missing"]
    assert {f.family for f in select_faults(["router", "hyper"])} == {"router", "hyper"}
    assert len(select_faults(["*sink*"])) >= 3
    assert not any(f.knockout for f in select_faults([]))
    assert all(f.knockout for f in select_faults(["knockout"]))
    with pytest.raises(DSV4Error, match="no fault matches 'sink_mising'") as error:
        select_faults(["sink_mising"])
    assert "sink_missing" in error.value.hint


def test_a_plugins_faults_are_a_family_of_their_own():
    with registered_for_a_while():
        load_plugins([str(Path(__file__).with_name("unseen_faults.py"))])
        unseen = select_faults(["unseen_faults"])
        assert len(unseen) == 35 and {f.family for f in unseen} == {"unseen_faults"}
        assert [f.name for f in unseen if f.combination] == ["norm_strides_ignored_by_rope"]
    assert "negated" not in FAULTS


def test_everywhere_is_every_layer_and_both_sublayers():
    fault = replace(FAULTS["comb_transposed"], sites=("L2/attn/hc_post", "L3/attn/core", "embed"))
    suffix = "=fault/comb_transposed"
    assert fault.everywhere == [f"*/hc_post{suffix}", f"*/attn/core{suffix}", f"embed{suffix}"]


def test_ops_are_done_right_by_the_reference_unless_asked():
    calls = []

    def spy(x: Tensor, **params: Any) -> Tensor:
        calls.append(1)
        return x

    x = torch.ones(1, 4)
    with registered_for_a_while():
        registry.implementation(op="rms_norm", name="spy")(spy)
        expected = right("rms_norm")(x, weight=None, eps=1.0)
        with computed_by("spy"):
            assert right("rms_norm")(x, weight=None, eps=1.0) is x
            assert right("moe_sum")(x, x, dtype=x.dtype).equal(2 * x)  # no spy: the reference
        assert calls == [1]
        assert right("rms_norm")(x, weight=None, eps=1.0).equal(expected)


# ------------------------------------------------------------------------------ by route


def test_the_engine_does_not_load_faults():
    modules = modules_after(
        "import dsv4_bench.engine.model, dsv4_bench.engine.cpu, dsv4_bench.workbench.loading"
    )
    assert in_package(modules, "probes.faults") == []


def test_a_route_that_names_a_fault_loads_the_catalogue():
    modules = modules_after(
        "from dsv4_bench.workbench.loading import load_model\n"
        "loaded = load_model({'route': ['kernel', '*/hc_post=fault/comb_transposed']})\n"
        "assert loaded.model.sites['L7/ffn/hc_post'].stamp.implementation == 'fault/comb_transposed'"
    )
    assert "dsv4_bench.probes.faults.hyper" in modules


def test_an_unknown_fault_in_a_route_is_named():
    with pytest.raises(DSV4Error, match="unknown implementation 'fault/comb_transpose'") as error:
        read_route(["*/hc_post=fault/comb_transpose"])
    assert "fault/comb_transposed" in error.value.hint


def test_a_session_switches_a_fault_like_any_route(make_checkpoint: Any):
    session = Driver(make_checkpoint(), tokens=[1, 2, 3])
    changed = session.command("route L1/attn/hc_post=fault/comb_transposed")["changed"]
    assert [c["site"] for c in changed] == ["L1/attn/hc_post"]
    assert changed[0]["after"]["implementation"] == "fault/comb_transposed"
