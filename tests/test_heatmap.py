"""`heatmap` and `anomaly` in a session: what they compare, what they refuse, where they stop."""

from __future__ import annotations

import pytest
from driver import Driver, implementations, scaled

import dsv4_bench.engine.cpu  # noqa: F401  (registers what the tests replace)
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import reference
from dsv4_bench.workbench.heat import Request, parse_request

TOKENS = [(17 * i + 5) % 300 for i in range(60)]
INF = float("inf")


@pytest.fixture
def start(make_checkpoint, tmp_path):
    started = []

    def begin(**options):
        (tmp_path / str(len(started))).mkdir()
        fields = {"checkpoint": str(make_checkpoint()), "tokens": TOKENS, **options}
        started.append(Driver(tmp_path / str(len(started)), **fields))
        return started[-1]

    yield begin
    for driver in started:
        driver.close()


def one_tile(*args, **params):
    """An attention that is wrong in rows 32-47 of head 1."""
    out, lse = reference("attention")(*args, **params)
    out[32:48, 1] *= 1.5
    return out, lse


def test_the_map_shows_where_an_op_is_wrong(start):
    with implementations(attention__tile=one_tile):
        driver = start(route=["L1/attn/core=tile"])
        driver.command("until L1/attn/core")
        heat = driver.command("heatmap cells=4x4")
        assert (heat["site"], heat["output"], heat["route"], heat["against"]) == (
            "L1/attn/core", "o", "tile", "reference",
        )  # fmt: skip
        assert heat["outputs"] == ["o", "lse"] and heat["block"] == (16, 128)
        wrong = [(r, c) for r, row in enumerate(heat["error"]) for c, e in enumerate(row) if e]
        assert wrong == [(2, 1)]
        row, column = heat["at"][2][1]
        assert 32 <= row < 48 and 128 <= column < 256
        assert heat["ours"][2][1] == pytest.approx(1.5 * heat["theirs"][2][1])
        closer = driver.command("heatmap o rows=32:40 columns=128:136 cells=8x8")
        assert closer["block"] == (1, 1) and all(e > 0 for row in closer["error"] for e in row)
        assert driver.command("heatmap lse")["error"][0][0] == 0


def test_the_worst_output_comes_first_and_nothing_is_run_twice(start, monkeypatch):
    def wrong_lse(*args, **params):
        out, lse = reference("attention")(*args, **params)
        return out, lse + 1

    runs = []
    with implementations(attention__lse=wrong_lse):
        driver = start(route=["L1/attn/core=lse"], shadow="L1/attn/core")
        shadow = driver.debugger.shadow
        rerun = shadow.rerun
        monkeypatch.setattr(shadow, "rerun", lambda *args: runs.append(1) or rerun(*args))
        driver.command("until L1/attn/core")
        assert driver.command("heatmap")["output"] == "lse"
        driver.command("heatmap o")
        assert runs == [1]  # for the shadow; its result is kept for the maps


def test_on_the_reference_the_kernel_is_what_is_wrong(start):
    with implementations(attention__cpu=one_tile):
        driver = start(route=["reference"])
        driver.command("until L1/attn/core")
        heat = driver.command("heatmap cells=4x4")
        assert (heat["route"], heat["against"]) == ("cpu", "reference")
        assert heat["ours"][2][1] == pytest.approx(1.5 * heat["theirs"][2][1])


def test_without_another_implementation_it_is_float64(start, monkeypatch):
    driver = start(route=["reference"])
    driver.command("until L1/attn/norm")
    monkeypatch.setattr(driver.debugger.shadow, "other", lambda site: None)
    heat = driver.command("heatmap")
    assert (heat["route"], heat["against"]) == ("reference", "float64")
    assert 0 < max(max(row) for row in heat["error"]) < 1e-5


def test_what_cannot_be_shown_is_refused(start):
    driver = start()
    with pytest.raises(DSV4Error, match="no op is held"):
        driver.command("heatmap")
    driver.command("until L1/attn/core")
    with pytest.raises(DSV4Error, match="has no output 'oo'") as error:
        driver.command("heatmap oo")
    assert "'o'" in error.value.hint
    with pytest.raises(DSV4Error, match="is not in 60 rows x 512 columns"):
        driver.command("heatmap rows=0:61")


def test_requests():
    assert parse_request("") == Request()
    assert parse_request("y rows=1:2 columns=3:4 cells=5x6") == Request("y", (1, 2), (3, 4), (5, 6))
    for bad in ("y z", "rows=1", "rows=2:1:3", "cell=1x1", "rows=1:2 rows=1:2", "cells=axb"):
        with pytest.raises(DSV4Error, match="cannot read"):
            parse_request(bad)


def test_anomaly_runs_to_the_first_wrong_op(start):
    with implementations(linear__off=scaled("linear", 1.01)):
        driver = start(
            route=["L1/attn/wq_b=off", "L2/attn/wq_b=off"], shadow="on", probes=["stats"]
        )
        state = driver.command("anomaly")
        assert (state["site"], state["state"]) == ("L1/attn/wq_b", "stopped")
        assert state["why"] == "anomaly: constant_factor, own error 0.01"
        assert driver.command("anomaly")["site"] == "L2/attn/wq_b"
        assert driver.command("op")["signature"]["kind"] == "constant_factor"
        rows = {row["path"]: row for row in driver.command("sites")["sites"]}
        assert rows["L1/attn/wq_b"]["anomaly"] == "over" and rows["L1/attn/wq_b"]["times"] > 1000
        assert rows["L1/attn/wq_a"]["anomaly"] == "" and rows["L1/attn/wq_a"]["times"] <= 1
        while state["state"] != "finished":
            state = driver.command("anomaly")
            assert state["state"] == "finished" or state["site"].endswith("/wq_b")


def test_a_known_bug_is_switched_on_by_route_caught_and_named(start):
    driver = start(route=["reference"], shadow="on")
    rows = driver.command("faults comb_transposed")["faults"]
    assert rows[0]["name"] == "fault/comb_transposed" and rows[0]["ops"] == ["hc_post"]
    driver.command("until L1/attn/hc_post")
    changed = driver.command("route L1/attn/hc_post=fault/comb_transposed")["changed"]
    assert [row["site"] for row in changed] == ["L1/attn/hc_post"]
    view = driver.command("op")
    assert view["anomaly"] == "over" and view["signature"]["kind"] == "transposed"
    assert not [a for a in view["alternatives"] if a["name"].startswith("fault/")]
    with pytest.raises(DSV4Error, match="no fault matches"):
        driver.command("faults comb_transposd")


def test_anomaly_stops_at_a_nan(start):
    def with_nan(*args, **params):
        y = reference("rms_norm")(*args, **params)
        y[3, 5] = torch_nan
        return y

    torch_nan = float("nan")
    with implementations(rms_norm__nan=with_nan):
        driver = start(route=["L1/ffn/norm=nan"], probes=["stats"])
        state = driver.command("anomaly")
        assert (state["site"], state["why"]) == ("L1/ffn/norm", "anomaly: 1 NaN in y")
        driver.command("shadow on")
        rows = {row["path"]: row for row in driver.command("sites")["sites"]}
        assert rows["L1/ffn/norm"]["anomaly"] == "over" and rows["L1/ffn/norm"]["times"] == INF
