"""Carried error: against a run on the reference from the first token on, at any stop, in any order."""

from __future__ import annotations

import pytest
import torch
from driver import Driver, finish, implementations, scaled

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.metrics import relative_error

TOKENS = [(17 * i + 5) % 300 for i in range(139)]
OPTIONS = {"tokens": TOKENS, "chunks": [130, 7], "max_new_tokens": 2}


@pytest.fixture
def start(make_checkpoint, tmp_path):
    started = []

    def begin(**options):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        fields = {"checkpoint": str(make_checkpoint()), **OPTIONS, **options}
        started.append(Driver(folder, **fields))
        return started[-1]

    yield begin
    for driver in started:
        driver.close()


def carried(driver: Driver) -> dict[str, float]:
    rows = driver.command("sites")["sites"]
    return {row["path"]: row["carried_error"] for row in rows if row["carried_error"] is not None}


def held(driver: Driver, name: str) -> torch.Tensor:
    return driver.debugger.held.call.outputs[name].clone()


def test_a_run_on_the_reference_carries_nothing(start):
    driver = start(carried=True)
    finish(driver)
    errors = carried(driver)
    assert len(errors) > 100 and set(errors.values()) == {0.0}


def test_an_error_spreads_from_where_it_is_made(start):
    """The number equals the difference of two whole sessions, one of them without the fault."""
    clean, at = start(), "L3/ffn/norm"
    clean.command(f"until {at}")
    truth = held(clean, "y")
    with implementations(hc_post__off=scaled("hc_post", 1.01)):
        driver = start(route=["L1/attn/hc_post=off"], carried=True)
        driver.command(f"until {at}")
        errors = carried(driver)
        assert errors["L1/attn/norm"] == 0
        assert errors["L1/attn/hc_post"] == pytest.approx(0.01, rel=1e-3)
        assert errors[at] == pytest.approx(relative_error(held(driver, "y"), truth), rel=1e-6)
        assert errors[at] > 1e-3


def test_switching_on_late_going_back_and_decoding_give_the_same_numbers(start):
    with implementations(hc_post__off=scaled("hc_post", 1.01)):
        options = {"route": ["L1/attn/hc_post=off"]}
        straight = start(carried=True, **options)
        straight.command("layer 8")  # in the second piece of the prompt
        expected = carried(straight)
        late = start(**options)
        late.command("layer 8")
        assert carried(late) == {}
        assert late.command("carried on")["carried"] is True
        late.command("goto 0")
        late.command("goto 2")
        late.command("rerun")
        found = carried(late)
        assert found == {path: expected[path] for path in found}
        assert found["L2/ffn/hc_post"] > 0 and len(found) > 40
        straight.command("layer 10")  # a generated token
        assert straight.debugger.forward == 3
        assert 0 < carried(straight)["L2/ffn/hc_post"] < 1


def test_it_changes_no_bit_and_no_stamp(start):
    with implementations(hc_post__off=scaled("hc_post", 1.01)):
        plain, watched = (
            start(route=["*/hc_post=off"]),
            start(route=["*/hc_post=off"], carried=True),
        )
        assert torch.equal(finish(plain)[0], finish(watched)[0])
        assert plain.command("stamps") == watched.command("stamps")


def test_a_nan_and_another_shape_are_infinite(start):
    def with_nan(*args, **params):
        from dsv4_bench.engine.registry import reference

        y = reference("rms_norm")(*args, **params)
        y[0, 0] = torch.nan
        return y

    with implementations(rms_norm__nan=with_nan):
        driver = start(route=["L0/ffn/norm=nan"], carried=True)
        driver.command("until L0/ffn/norm")
        assert driver.command("op")["carried_error"] == float("inf")


def test_pause_ends_a_catch_up_which_goes_on_when_asked_again(start):
    driver = start()
    driver.command("layer 7")
    seen = []
    shadow = driver.debugger.shadow

    def pause(forward, layer, between=shadow.reference.between):
        seen.append((forward, layer))
        driver.debugger.pause = len(seen) == 4
        between(forward, layer)

    shadow.reference.between = pause
    assert driver.command("carried on")["carried"] is False
    assert "paused in layer 2 of forward pass 1" in driver.kinds("log")[-1]["text"]
    driver.debugger.pause = False
    assert driver.command("carried on")["carried"] is True
    assert seen[:5] == [(0, -1), (0, 0), (0, 1), (0, 2), (0, 2)]
    assert driver.command("op")["carried_error"] == 0


def test_only_on_and_off(start):
    driver = start()
    with pytest.raises(DSV4Error, match="neither on nor off"):
        driver.command("carried sideways")
    assert driver.command("carried")["carried"] is True
    assert driver.command("carried")["carried"] is False
