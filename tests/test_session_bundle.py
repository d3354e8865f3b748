"""`bundle`, `compare` and `difference` in a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Driver, finish, implementations, scaled

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.probes.bundle import open_bundle
from dsv4_bench.probes.compare import bits_equal

TOKENS = [(17 * i + 5) % 300 for i in range(40)]


@pytest.fixture(autouse=True)
def only_the_calls(monkeypatch):
    """Plots and the environment report take seconds, and are tested elsewhere."""
    monkeypatch.setattr("dsv4_bench.workbench.bundles.plots.draw_plots", lambda *args: [])
    monkeypatch.setattr("dsv4_bench.workbench.bundles.bundling.examine_machine", dict)


@pytest.fixture
def start(make_checkpoint, tmp_path):
    started = []

    def begin(**options):
        folder = tmp_path / f"session{len(started)}"
        folder.mkdir()
        fields = {"checkpoint": str(make_checkpoint()), "tokens": TOKENS, **options}
        started.append(Driver(folder, **fields))
        return started[-1]

    yield begin
    for driver in started:
        driver.close()


def test_a_bundle_holds_the_layer_as_it_runs_now(start, tmp_path):
    out = tmp_path / "bug.zip"
    with implementations(linear__off=scaled("linear", 1.01)):
        driver = start(route=["L1/attn/wq_b=off"], probes=["stats"])
        driver.command("until L1/attn/core")
        outputs = {n: t.clone() for n, t in driver.debugger.held.call.outputs.items()}
        before = driver.command("status"), driver.command("stamps")
        result = driver.command(f"bundle {out}")
        assert (driver.command("status")["index"], driver.command("stamps")) == (
            before[0]["index"], before[1],
        )  # fmt: skip
    opened = open_bundle(out)
    paths = [call.site.path for call in opened.calls]
    assert paths == [p for p in driver.debugger.order if p.startswith("L1/")]
    assert result["first"]["site"] == "L1/attn/wq_b"
    assert result["first"]["kind"] == "constant_factor"
    assert result["text"].startswith(f"wrote {out}: {len(paths)} ops")
    core = opened.load(next(c for c in opened.calls if c.site.path == "L1/attn/core"))
    assert all(bits_equal(core.captured.outputs[name], t) for name, t in outputs.items())
    assert opened.manifest["tokens"] == TOKENS
    sites = {row["site"] for row in opened.readings()}
    assert "L1/attn/core" in sites and "L0/attn/core" not in sites


def test_it_changes_no_bit_and_works_in_decode_embed_and_head(start, tmp_path):
    options = {"chunks": [30, 10], "max_new_tokens": 2, "route": ["kernel"]}
    truth = finish(start(**options))
    driver = start(**options)
    for number, line in enumerate(["step", "layer 2", "until head/norm", "layer 9", "layer"]):
        driver.command(line)
        out = tmp_path / f"b{number}"
        result = driver.command(f"bundle {out}")
        layer = driver.command("status")["site"].partition("/")[0]
        assert {c.site.path.partition("/")[0] for c in open_bundle(out).calls} == {layer}
        assert result["first"] is None
    assert driver.debugger.forward == 2
    chunks = open_bundle(tmp_path / "b4").manifest["chunks"]
    assert chunks == [30, 10, 1]
    logits, tokens = finish(driver)
    assert torch.equal(logits, truth[0]) and tokens == truth[1]


def test_what_cannot_be_written_is_refused(start, tmp_path):
    driver = start()
    with pytest.raises(DSV4Error, match="nothing has run yet"):
        driver.command(f"bundle {tmp_path}/a")
    driver.command("until L1/attn/core")
    with pytest.raises(DSV4Error, match="no site of this layer matches 'L2/attn/core'") as error:
        driver.command(f"bundle {tmp_path}/a L2/attn/core")
    assert "stands in L1" in error.value.hint
    driver.debugger.pause = True
    with pytest.raises(DSV4Error, match="paused at op 1 of 1; nothing is written"):
        driver.command(f"bundle {tmp_path}/a L1/attn/core")
    driver.debugger.pause = False
    assert not (tmp_path / "a").exists()
    assert driver.command(f"bundle {tmp_path}/a */core")["calls"] == 1


def two_bundles(start, tmp_path: Path) -> tuple[Path, Path]:
    """The same layer, clean and with one op wrong in some rows."""

    def late_rows(*args, **params):
        y = scaled("rms_norm", 1.0)(*args, **params).clone()
        y[20:30] *= 1.5
        return y

    clean = start()
    clean.command("until L1/ffn/norm")
    clean.command(f"bundle {tmp_path}/a.zip")
    with implementations(rms_norm__late=late_rows):
        wrong = start(route=["L1/ffn/norm=late"])
        wrong.command("until L1/ffn/norm")
        wrong.command(f"bundle {tmp_path}/b.zip")
    return tmp_path / "a.zip", tmp_path / "b.zip"


def test_compare_names_the_first_difference_and_maps_it(start, tmp_path):
    a, b = two_bundles(start, tmp_path)
    driver = start()
    with pytest.raises(DSV4Error, match="nothing is compared"):
        driver.command("difference 0")
    report = driver.command(f"compare {a} {b}")
    assert (report["status"], report["first"]["site"]) == ("different", "L1/ffn/norm")
    assert report["a"] == str(a)
    number = next(i for i, op in enumerate(report["ops"]) if op["site"] == "L1/ffn/norm")
    heat = driver.command(f"difference {number} cells=4x4")
    assert (heat["output"], heat["route"], heat["against"]) == ("y", "B late", "A reference")
    rows = [sum(map(bool, row)) for row in heat["error"]]
    assert heat["block"][0] == 16 and rows[0] == 0 and rows[1] > 0 and rows[2] == 0
    assert 20 <= heat["at"][1][0][0] < 30
    assert heat["ours"][1][0] == pytest.approx(1.5 * heat["theirs"][1][0])
    for bad in ("difference x", f"difference {len(report['ops'])}", f"difference {number} z"):
        with pytest.raises(DSV4Error):
            driver.command(bad)


def test_bundles_that_cannot_be_compared_are_refused(start, tmp_path):
    a, _ = two_bundles(start, tmp_path)
    driver = start()
    driver.command("until L2/ffn/norm")
    driver.command(f"bundle {tmp_path}/c.zip")
    with pytest.raises(DSV4Error, match="not comparable: other coverage"):
        driver.command(f"compare {a} {tmp_path}/c.zip")
    (tmp_path / "junk.zip").write_bytes(b"PK\x03\x04 junk")
    with pytest.raises(DSV4Error) as error:
        driver.command(f"compare {a} {tmp_path}/junk.zip")
    assert error.value.exit_code == ExitCode.BAD_INPUT
