"""`timing` in a session: what is timed, with which error, and that the session stands where it stood."""

from __future__ import annotations

import pytest
from driver import Driver, implementations

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import reference
from dsv4_bench.workbench.timing.ceilings import Ceilings

CEILINGS = Ceilings(
    device="test", threads=1, torch="", read=1e9, copy=1e9, launch=0.0,
    matrix={"float32": 1e15, "bfloat16": 1e15}, measured="",
)  # fmt: skip
TOKENS = [(17 * i + 5) % 300 for i in range(40)]


def slow_and_wrong(*args, **params):
    for _ in range(30):
        y = reference("rms_norm")(*args, **params)
    return y * 1.01


def test_the_current_layer_is_timed(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4_bench.workbench.timing_here.ceilings", lambda device, say: CEILINGS)
    with implementations(rms_norm__slow=slow_and_wrong):
        driver = Driver(
            tmp_path, checkpoint=str(make_checkpoint()), tokens=TOKENS, route=["L1/ffn/norm=slow"]
        )
        try:
            with pytest.raises(DSV4Error, match="nothing has run yet"):
                driver.command("timing")
            driver.command("until L1/ffn/norm")
            before = driver.command("status"), driver.command("stamps")
            timing = driver.command("timing */norm")
            after = driver.command("status")
            driver.debugger.pause = True
            with pytest.raises(DSV4Error, match="timing: paused at op 1 of"):
                driver.command("timing")
            driver.debugger.pause = False
        finally:
            driver.close()
    rows = {row["site"]: row for row in timing["sites"]}
    paths = list(rows)
    assert paths[0] == "L1/attn/norm" and paths[-1] == "L1/ffn/norm"
    slow = rows["L1/ffn/norm"]
    assert slow["kernel"] == "slow" and slow["verdict"] == "over" and slow["speedup"] < 0.5
    assert slow["own_error"] == pytest.approx(0.01, rel=1e-3)
    assert slow["floor"] == pytest.approx(slow["bytes"] / 1e9) and slow["bytes"] > 0
    assert (timing["group"], timing["kind"], timing["tokens"]) == ("L1", "CSA", [0, 40])
    assert after["site"] == before[0]["site"] and after["why"] == before[0]["why"]
