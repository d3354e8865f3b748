"""`dump`: what was asked for is in the bundle, within its size, and the run is as it was without"""

from __future__ import annotations

import json
import re
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import MICRO, PLUGIN, TOKENS, without_environment

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, implementation, parse_route, reference
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes import bundle
from dsv4_bench.probes.base import Probe, make_probes
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.bundles.dumping import Dumper, Selection, parse_layers

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dump") / "micro", MICRO, "nvfp4", seed=3)


@pytest.fixture(autouse=True)
def nothing_slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an environment report nor plots, but where the test is about them: both take long."""
    if "private" not in request.node.name:
        without_environment(monkeypatch)
    if not {"holds", "reports"} & set(request.node.name.split("_")):
        monkeypatch.setattr("dsv4_bench.workbench.bundles.plots.draw_plots", lambda *data: [])


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    yield file
    IMPLEMENTATIONS["attention"].pop("bug", None)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> Call:
    """`call(out, *words)`: (code, stdout, stderr) of a dump of the micro checkpoint."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS))

    def run(out: Path, *words: object) -> tuple[int, str, str]:
        fixed = ["dump", str(checkpoint), "--tokens", str(ids), "-o", str(out)]
        code = cli.main([*fixed, *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def dumper(checkpoint: Path, route: str = "kernel", **options: Any) -> Dumper:
    import dsv4_bench.engine.cpu  # noqa: F401

    model = Transformer(Checkpoint(checkpoint), torch.float32)
    model.set_route(parse_route([route]))
    settings = {"max_bytes": None, "quick": False, "probes": [], **options}
    selection = settings.pop("selection", Selection())
    probes = settings.pop("probes")
    return Dumper(model, TOKENS, (16, 1), selection, probes, **settings)


def quiet(*state: object) -> None:
    pass


# ------------------------------------------------------------------------------ content


def test_a_dump_holds_what_was_asked_for(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "b.zip"
    code, printed, narrated = call(out, "--layers", "1-2", "--sites", "*/attn/core", "--json")
    assert code == 0, narrated
    document = json.loads(printed)
    assert document["calls"] == 4 and document["left_out"] == [] and document["first"] is None
    assert document["bytes"] == out.stat().st_size
    opened = bundle.open_bundle(out)
    opened.verify()
    labels = [entry.label for entry in opened.calls]
    assert labels == ["L1/attn/core #0", "L2/attn/core #0", "L1/attn/core #1", "L2/attn/core #1"]
    manifest = opened.manifest
    assert manifest["tokens"] == TOKENS and manifest["chunks"] == [16, 1]
    assert manifest["checkpoint"]["config"]["hidden_size"] == MICRO.hidden_size
    assert manifest["stamps"]["L1/attn/core"]["launches"] > 0
    assert manifest["coverage"]["selected"] == manifest["coverage"]["captured"] == 2
    assert manifest["observer"]["bits_changed"] is False
    assert manifest["observer"]["slow_down"] > 0
    readings = opened.readings()
    assert {"stats", "residual", "softmax", "dump"} <= {row["probe"] for row in readings}
    names = zipfile.ZipFile(out).namelist()
    for plot in ("residual", "error", "attention", "experts", "scales"):
        assert {f"plots/{plot}.png", f"plots/{plot}.svg"} <= set(names)


def test_reports_are_self_contained_and_name_the_bug(
    call: Call, tmp_path: Path, plugin: Path
) -> None:
    out = tmp_path / "b"
    words = ("--layers", 1, "--plugin", plugin, "--route", "kernel", "--route", "L1/attn/core=bug")
    code, printed, _ = call(out, *words)
    sentence = "L1/attn/core: o = 1.01 x reference for head 1 of 2"
    assert code == 0 and sentence in printed
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert sentence in page and sentence in text
    assert "<svg" in page and "<script" not in page
    outside = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?((?:https?:)?//[^"'\s>]+)""", page)
    assert outside == []
    assert "| L1/attn/core |" in text and "OVER" in text and len(text) < 65_536
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["first"]["kind"] == "constant_factor"
    rows = [r for r in bundle.open_bundle(out).readings() if r["name"] == "carried_error"]
    carried = {row["site"]: row["value"] for row in rows if row["forward"] == 0}
    assert carried["L0/ffn/hc_post"] < 1e-5 < carried["L1/ffn/hc_post"]


def test_text_from_the_run_cannot_break_the_reports(call: Call, tmp_path: Path) -> None:
    from dsv4_bench.workbench.bundles.reporting import html_report, markdown_report

    assert call(tmp_path / "b", "--sites", "L0/attn/norm")[0] == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    calls = json.loads((tmp_path / "b" / "calls.json").read_text())["calls"]
    evil = "<script>alert(1)</script> | `x` @everyone"
    manifest["checkpoint"]["name"] = evil
    calls[0]["stamp"]["implementation"] = evil
    page, text = html_report(manifest, calls, [], []), markdown_report(manifest, calls, [])
    assert "<script>" not in page and "<script>" not in text
    assert "@everyone" not in text and "| `x`" not in text


def test_nothing_private_gets_in(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(
        "sys.argv", ["/home/somebody/bin/dsv4-bench", "dump", "--api-key=hf_verysecret"]
    )
    assert call(tmp_path / "b", "--sites", "L0/attn/norm", "--quick")[0] == 0
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"verysecret" not in data and b"/home/somebody" not in data, path


# ------------------------------------------------------------------------------ size


def test_the_estimate_holds_for_every_op(checkpoint: Path, tmp_path: Path) -> None:
    """Never too low; and not much too high, so that the cap is used."""
    run = dumper(checkpoint)
    run.run(tmp_path / "b", "", quiet)
    opened = bundle.open_bundle(tmp_path / "b")
    assert len(opened.calls) == len(run.plan.chosen) == 183
    stored = sum(e.bytes for n, e in opened.files.items() if n.startswith(("calls/", "weights/")))
    assert stored <= run.plan.bytes
    from dsv4_bench.probes.bundle.estimate import Shapes, estimate

    shapes, cache = Shapes(run.model.config, run.model.dtype), run.model.new_cache()
    loose = []
    for forward, step in enumerate(run.steps):
        for layer in cache.layers:
            layer.reserve(step.starts[0] + step.lengths[0])
        for entry in opened.calls:
            if entry.forward != forward:
                continue
            site = run.model.sites[entry.site.path]
            layer_cache = None if site.layer is None else cache.layers[site.layer]
            bound = estimate(site, step, layer_cache, shapes).call
            file = next(
                n
                for n in opened.files
                if n.startswith("calls/")
                and n.endswith(f"{site.path.replace('/', '.')}.safetensors")
                and _forward(opened, n) == forward
            )
            actual = opened.files[file].bytes
            weights = (
                0
                if site.op != "experts"
                else opened.files[f"weights/{site.path.replace('/', '.')}.safetensors"].bytes
            )
            assert actual <= bound + 400, (entry.label, actual, bound)
            if bound > 3 * (actual + weights) + 2000:
                loose.append((entry.label, actual, bound))
    assert loose == []


def _forward(opened: bundle.Bundle, file: str) -> int:
    for entry in opened.calls:
        for value in entry.inputs.values():
            if value.get("file") == file:
                return entry.forward
    raise AssertionError(file)


@pytest.mark.parametrize("megabytes", [2.1, 2.3, 3])
def test_the_cap_holds_and_names_what_it_cost(call: Call, tmp_path: Path, megabytes: float) -> None:
    out = tmp_path / "b"
    code, printed, narrated = call(out, "--max-size", megabytes, "--json", "--probes", "stats")
    assert code == 0, narrated
    document = json.loads(printed)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size <= megabytes * 1e6
    left = json.loads((out / "manifest.json").read_text())["left_out"]
    assert len(left) == len(document["left_out"]) == 183 - document["calls"]
    assert bool(left) == ("left out: " in narrated)
    if left:
        assert left[0]["site"] in (out / "report.html").read_text()


def test_under_a_tight_cap_the_wrong_op_gets_in(call: Call, tmp_path: Path, plugin: Path) -> None:
    out = tmp_path / "b.zip"
    route = ("--plugin", plugin, "--route", "kernel", "--route", "L2/attn/core=bug")
    assert call(out, "--max-size", 2.05, *route)[0] == 0
    opened = bundle.open_bundle(out)
    assert "L2/attn/core #0" in [entry.label for entry in opened.calls]
    assert opened.manifest["first"]["site"] == "L2/attn/core"
    assert len(opened.manifest["left_out"]) > 100


# ------------------------------------------------------------------------------ honesty


class Meddler(Probe):
    """Changes what it looks at, as no probe may."""

    name = "meddler"

    def wants(self, site: Any) -> bool:
        return site.path == "L1/attn/norm"

    def observe(self, call: Any) -> Iterator[Any]:
        call.outputs["y"].mul_(1.5)
        yield from ()


def test_a_probe_that_changes_bits_is_told_on(checkpoint: Path, tmp_path: Path) -> None:
    nothing = Selection(sites="L0/attn/norm")
    for probes, changed in (([Meddler()], True), (make_probes(["all"]), False)):
        run = dumper(checkpoint, selection=nothing, probes=probes)
        run.run(tmp_path / "b.zip", "", quiet)
        assert (
            bundle.open_bundle(tmp_path / "b.zip").manifest["observer"]["bits_changed"] is changed
        )


def test_the_route_is_as_it_was_after_a_dump(checkpoint: Path, tmp_path: Path) -> None:
    run = dumper(checkpoint, "L1/attn/core=cpu")
    before = {path: site.impl for path, site in run.model.sites.items()}
    run.run(tmp_path / "b", "", quiet)
    assert {path: site.impl for path, site in run.model.sites.items()} == before
    assert all(site.tap is None for site in run.model.sites.values())


# ------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("name", ["b.zip", "b"])
def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    run = dumper(checkpoint, quick=True)

    def progress(text: str, done: int, total: int) -> None:
        if text == "dump L2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / name, "", progress)
    assert list(tmp_path.iterdir()) == []
    assert all(site.tap is None for site in run.model.sites.values())


def test_a_full_disk_is_one_line(call: Call, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        code, printed, narrated = call(tmp_path / "b.zip", "--layers", 0, "--quick")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and printed == ""
    assert "cannot write" in narrated and "File too large" in narrated and "hint: " in narrated
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]


# ------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "3"), "no such layers"),
        (("--layers", "2-1"), "no such layers"),
        (("--layers", "x"), "no such layers"),
        (("--sites", "*/attn/cor"), "no site matches"),
        (("--layers", "0", "--sites", "head/*"), "no site matches 'head/*' in layers 0"),
        (("--forward", "2"), "there are 2 forward passes"),
        (("--forward", "x"), "numbers from 0"),
        (("--probes", "stat"), "unknown probe 'stat'"),
        (("--max-size", "-1"), "no size in MB"),
        (("--max-size", "1"), "leaves no room"),
        (("--max-size", "nan"), "no size in MB"),
    ],
)
def test_usage_errors(call: Call, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, printed, narrated = call(tmp_path / "b.zip", *words)
    assert (code, printed) == (2, "") and message in narrated and "hint: " in narrated
    assert not (tmp_path / "b.zip").exists()


def test_layers_by_hand() -> None:
    assert parse_layers("0,2-4", 6) == (0, 2, 3, 4)
    assert parse_layers("5", 6) == (5,)
    for text in ("6", "", "1-", "-1", "1,,2"):
        with pytest.raises(DSV4Error):
            parse_layers(text, 6)


# ------------------------------------------------------------------------------ strided caches


def test_a_kernel_that_is_wrong_on_the_engines_strided_cache_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ring and entries packed into one padded buffer, as serving engines do: dumped, then replayed."""
    from dsv4_bench.engine import cache
    from dsv4_bench.workbench.bundles.replaying import Replayer
    from dsv4_bench.workbench.checking import layerwise

    class Packed(cache.LayerCache):
        """A ring whose rows lie in a buffer twice as wide; the other half is NaN."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            buffer = torch.full((len(self.ring), 2 * self.ring.shape[1]), torch.nan)
            self.ring = buffer[:, : self.ring.shape[1]].zero_()

    def packed_rows(pool: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(0).set_(pool.untyped_storage(), pool.storage_offset(), (pool.numel(),))
        return flat.view(pool.shape)

    @implementation(op="attention", name="unstrided")
    def attention(q, window, *rest, **params):  # type: ignore[no-untyped-def]
        return reference("attention")(q, packed_rows(window), *rest, **params)

    out, chosen = tmp_path / "b.zip", Selection(sites="L1/attn/core")
    try:
        dumper(checkpoint, "L1/attn/core=unstrided", selection=chosen).run(out, "", quiet)
        assert bundle.open_bundle(out).manifest["first"] is None  # right on contiguous rings
        monkeypatch.setattr(layerwise, "LayerCache", Packed)
        dumper(checkpoint, "L1/attn/core=unstrided", selection=chosen).run(out, "", quiet)
        monkeypatch.undo()
        opened = bundle.open_bundle(out)
        prefill, decode = Replayer(opened).run(opened.calls).ops
    finally:
        del IMPLEMENTATIONS["attention"]["unstrided"]
    assert prefill.verdict == "ok"  # its window is gathered, so contiguous
    assert decode.verdict == decode.stored_verdict == "over" and decode.same_bits
    assert opened.manifest["first"]["forward"] == 1
    assert Replayer(opened, ["kernel"]).run(opened.calls).status == "clean"
