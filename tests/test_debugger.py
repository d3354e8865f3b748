"""Stepping, stopping, going back, switching: in the test's own process, without a worker."""

from __future__ import annotations

import threading

import pytest
import torch
from driver import Driver, finish, implementations, scaled

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import generate, teacher_forced_logits
from dsv4_bench.engine.registry import reference
from dsv4_bench.probes.base import PROBES, Probe, probe
from dsv4_bench.probes.tap import set_taps

TOKENS = [(17 * i + 5) % 300 for i in range(139)]  # beyond the window, an HCA entry, an open tail
CHUNKS = [130, 7]  # 130, 7, 2
NEW = 3


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def start(folder, tmp_path):
    """`start(**options)`: a session over TOKENS in CHUNKS with NEW generated tokens."""
    started = []

    def begin(**options):
        (tmp_path / str(len(started))).mkdir()
        fields = {"checkpoint": str(folder), "tokens": TOKENS, "chunks": CHUNKS}
        driver = Driver(
            tmp_path / str(len(started)), **{**fields, "max_new_tokens": NEW, **options}
        )
        started.append(driver)
        return driver

    yield begin
    for driver in started:
        driver.close()


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """Logits of the last position after every forward pass, and the tokens, of a run without stops."""
    driver = Driver(
        tmp_path_factory.mktemp("straight"),
        checkpoint=str(folder),
        tokens=TOKENS,
        chunks=CHUNKS,
        max_new_tokens=NEW,
    )
    logits, tokens = finish(driver)
    driver.close()
    return logits.clone(), tokens


# ------------------------------------------------------------------------------ moving


def test_a_run_generates_what_generate_does(start, straight):
    driver = start()
    logits, tokens = finish(driver)
    model = driver.debugger.model
    set_taps(model.sites.values(), None)
    assert tokens == list(generate(model, TOKENS, NEW, chunks=CHUNKS))
    assert len(tokens) == NEW
    truth = teacher_forced_logits(model, TOKENS + tokens[:-1], [*CHUNKS, 2, 1])
    assert torch.equal(logits[-1], truth[-1])
    assert torch.equal(logits, straight[0])


def test_step_stops_after_each_op_in_order(start):
    driver = start()
    seen = [driver.command("step")["site"] for _ in range(5)]
    assert seen == driver.debugger.order[:5]
    assert seen[:2] == ["embed", "L0/attn/hc_pre"]
    state = driver.command("step 4")
    assert (state["index"], state["why"], state["ran"]) == (8, "step", 4)


def test_next_runs_over_a_deeper_group_and_finish_to_its_end(start):
    driver = start()
    driver.command("until L1/attn/kv_rope")
    assert driver.command("next")["site"] == "L1/attn/compressor/write"
    assert driver.command("next 2")["site"] == "L1/attn/gather_swa"
    assert driver.command("finish")["site"] == "L1/attn/hc_post"
    assert driver.command("next")["site"] == "L1/ffn/hc_pre"


def test_layer_and_goto(start):
    driver = start()
    assert driver.command("layer")["site"] == "L0/ffn/hc_post"
    assert driver.command("layer 2")["site"] == "L2/ffn/hc_post"
    assert driver.command("goto 0")["site"] == "L0/ffn/hc_post"
    assert driver.command("goto L3")["site"] == "L3/ffn/hc_post"
    assert driver.command("layer")["site"] == "head/logits"
    with pytest.raises(DSV4Error, match="layer 9 does not exist"):
        driver.command("goto 9")


@pytest.mark.parametrize("line", ["step 0", "step -1", "layer x", "goto", "step 1 2", "until"])
def test_bad_arguments_are_refused_with_the_usage(start, line):
    driver = start()
    with pytest.raises(DSV4Error) as error:
        driver.command(line)
    assert error.value.hint.startswith("usage: ")


def test_back_beyond_the_first_op_is_refused(start):
    driver = start()
    for line in ("back", "rerun"):
        with pytest.raises(DSV4Error):
            driver.command(line)
    driver.command("step 2")
    with pytest.raises(DSV4Error, match="first op"):
        driver.command("back 2")
    assert driver.command("back")["site"] == "embed"


def test_after_the_end_only_going_back_runs(start, straight):
    driver = start()
    finish(driver)
    with pytest.raises(DSV4Error, match="finished"):
        driver.command("step")
    assert driver.command("back 2")["site"] == "head/hc_head"
    assert driver.command("goto 1")["site"] == "L1/ffn/hc_post"
    assert torch.equal(finish(driver)[0], straight[0])


def test_reset_starts_over(start, straight):
    driver = start()
    driver.command("layer 3")
    state = driver.command("reset")
    assert (state["state"], state["index"], state["tokens"]) == ("ready", -1, [0, 0])
    logits, tokens = finish(driver)
    assert torch.equal(logits, straight[0]) and tokens == straight[1]


WALKS = {
    "stepping": ["step 40", "next 7", "finish", "layer", "step 3"],
    "back in the first chunk": ["until L1/attn/compressor/pool", "back 9", "rerun", "step 20"],
    "rerun after every in-place op": ["until */write", "rerun", "until */window_write", "rerun"],
    "back over layers": ["layer 3", "back 60", "goto 3", "goto 0"],
    "embed": ["step", "rerun", "step 2", "back 2", "rerun"],
    "second chunk": ["layer 6", "goto 1", "until L2/attn/compressor/pool", "back 20", "rerun"],
    "decode": ["layer 17", "goto 0", "step 11", "back 4", "rerun", "goto 3", "goto 1"],
    "head": ["until head/norm", "back", "rerun", "until head/norm", "goto 0"],
    "all over": ["continue", "goto 2", "step 5", "back 3", "goto 0", "layer 2", "rerun"],
}


@pytest.mark.parametrize("walk", WALKS, ids=list(WALKS))
def test_going_back_changes_no_bit(start, straight, walk):
    driver = start()
    for line in WALKS[walk]:
        assert driver.command(line)["state"] in ("stopped", "finished")
    logits, tokens = finish(driver)
    assert torch.equal(logits, straight[0])
    assert tokens == straight[1]


def test_every_op_rerun_at_once_changes_no_bit(start, straight):
    """In-place ops are not applied twice: the route of the held op is switched back and forth."""
    driver = start(tokens=TOKENS[:134], chunks=[131], max_new_tokens=2)
    with implementations(
        compressor__same=lambda *a, **k: reference("compressor")(*a, **k),
        cache_write__same=lambda *a, **k: reference("cache_write")(*a, **k),
    ):
        driver.command("break */compressor/*")
        driver.command("break */window_write")
        switched = 0
        while (state := driver.command("continue"))["state"] != "finished":
            if state["op"] not in ("compressor", "cache_write"):
                continue
            for name in ("same", "reference"):
                result = driver.command(f"route {state['site']}={name}")
                assert result["changed"][0]["effect"] == "NO EFFECT: same output bits"
                switched += 1
    assert switched > 20
    plain = start(tokens=TOKENS[:134], chunks=[131], max_new_tokens=2)
    assert torch.equal(driver.logits(), finish(plain)[0])


def test_end_of_sentence_ends_the_run_also_after_going_back(start, straight, monkeypatch):
    driver = start(max_new_tokens=8)
    object.__setattr__(driver.debugger.model.config, "eos_token_id", straight[1][1])
    state = driver.command("continue")
    assert state["state"] == "finished"
    assert state["generated"] == straight[1][:2]
    ran = state["forward"]
    driver.command("goto 1")
    state = driver.command("continue")
    assert (state["generated"], state["forward"]) == (straight[1][:2], ran)


def test_top_tokens_at_the_logits_and_at_the_end(start):
    driver = start(chunks=[], max_new_tokens=1)
    assert driver.command("step")["top"] == []
    here = driver.command("until head/logits")["top"]
    end = driver.command("continue")
    assert end["state"] == "finished" and end["top"] == here and len(here) == 5
    assert end["generated"] == [here[0]["id"]] and here[0]["p"] >= here[1]["p"]


# ------------------------------------------------------------------------------ type-ahead and pause


def test_type_ahead_is_answered_in_order(start):
    driver = start()
    ids = [driver.submit(line) for line in ("step", "step 3", "op", "break */core", "continue")]
    replies = [driver.reply() for _ in ids]
    assert [r["id"] for r in replies] == ids
    assert all(r["ok"] for r in replies)
    assert replies[1]["result"]["index"] == 3
    assert replies[2]["result"]["site"] == replies[1]["result"]["site"]
    assert replies[4]["result"]["site"] == "L0/attn/core"


def test_pause_stops_at_the_next_op_and_drops_what_would_run(start):
    reached, go_on = threading.Event(), threading.Event()

    def slow(*args, **params):
        reached.set()
        assert go_on.wait(60)
        return reference("attention")(*args, **params)

    with implementations(attention__slow=slow):
        driver = start(route=["L1/attn/core=slow"])
        first, second, look = (driver.submit(line) for line in ("continue", "step", "status"))
        assert reached.wait(60)
        pause = driver.submit("pause")
        dropped = driver.reply()
        assert (dropped["id"], dropped["ok"]) == (second, False)
        assert "dropped by `pause`" in dropped["error"]["message"]
        go_on.set()
        replies = {r["id"]: r for r in (driver.reply() for _ in range(3))}
    assert replies[first]["result"]["site"] == "L1/attn/core"
    assert replies[first]["result"]["why"] == "pause"
    assert replies[look]["ok"] and replies[pause]["result"]["state"] == "stopped"
    assert driver.command("step")["site"] == "L1/attn/o_rope"  # and it is over


# ------------------------------------------------------------------------------ breakpoints


def with_nan(*args, **params):
    out, lse = reference("attention")(*args, **params)
    out[2, 1, 5] = torch.nan
    return out, lse


def test_break_on_a_nan_stops_where_it_is_made(start):
    with implementations(attention__nan=with_nan):
        driver = start(route=["L2/attn/core=nan"])
        text = driver.command("break nan > 0")["text"]
        assert text == "breakpoint 1: nan > 0 (probe stats on)"
        driver.command("probes stats,nonfinite")
        state = driver.command("continue")
        assert state["site"] == "L2/attn/core"
        assert state["why"].startswith("breakpoint 1: nan > 0 (nan = 1")
        readings = driver.command("readings L2/attn/core nonfinite")["readings"]
        assert readings[0]["value"] == [2.0, 1.0, 5.0]
        driver.command("delete 1")
        driver.command("layer")
        others = driver.command("readings * nonfinite")["readings"]
        assert {r["site"] for r in others} == {"L2/attn/core"}  # it spreads, but is made once


def test_break_on_own_error_names_coordinate_and_values(start):
    with implementations(linear__off=scaled("linear", 1.001)):
        driver = start(route=["L1/attn/wq_a=off"])
        text = driver.command("break L1/attn/* own_error > limit")["text"]
        assert "(shadow on for L1/attn/*)" in text
        state = driver.command("continue")
        assert state["site"] == "L1/attn/wq_a"
        error = driver.command("op")["own_error"]
        assert error["relative_l2"] == pytest.approx(1e-3, rel=1e-3)
        assert error["ours"] == pytest.approx(1.001 * error["theirs"], rel=1e-4)
        row, column = error["coordinate"]
        assert f"y[{row}, {column}]: {error['ours']:.6g}, float64" in state["why"]
        assert "; y = 1.001 x reference" in state["why"]
        assert error["verdict"] == "over" and error["times"] > 100


def test_own_error_of_a_nan_is_infinite_and_stops(start):
    with implementations(attention__nan=with_nan):
        driver = start(route=["L2/attn/core=nan"])
        driver.command("break L2/attn/core own_error > limit")
        assert driver.command("continue")["site"] == "L2/attn/core"
        error = driver.command("op")["own_error"]
        assert error["relative_l2"] == float("inf")
        assert error["coordinate"] == [2, 1, 5]


def test_break_on_a_large_value_and_on_a_group(start):
    with implementations(shared_expert__big=scaled("shared_expert", 1e6)):
        driver = start(route=["L1/ffn/shared=big"])
        driver.command("break abs_max > 1e4")
        state = driver.command("continue")
        assert (state["site"], state["breaks"][0]["hits"]) == ("L1/ffn/shared", 1)
    driver.command("delete 1")
    driver.command("break L2/ffn")
    assert driver.command("continue")["site"] == "L2/ffn/hc_pre"


def test_break_again_deletes_and_bad_breaks_are_refused(start):
    driver = start()
    driver.command("break */core")
    driver.command("break nan > 0")
    assert driver.command("break */core")["text"] == "breakpoint 1 deleted"
    for bad in ("*/cora", "nam > 0", "nan > x", "nan >", "L0/* own_error >> 3", "no such thing"):
        with pytest.raises(DSV4Error) as error:
            driver.command(f"break {bad}")
        assert error.value.hint
    assert [b["number"] for b in driver.command("breaks")["breaks"]] == [2]
    with pytest.raises(DSV4Error, match="no breakpoint 7"):
        driver.command("delete 7")


# ------------------------------------------------------------------------------ routes


@pytest.mark.parametrize("site", ["L1/attn/wq_a", "L2/attn/compressor/wkv", "L3/ffn/experts"])
def test_a_switch_while_stopped_flows_on(start, site):
    op = "experts" if site.endswith("experts") else "linear"
    with implementations(**{f"{op}__off": scaled(op, 1.5)}):
        whole = start(route=[f"{site}=off"], chunks=[], max_new_tokens=1)
        expected = finish(whole)[0].clone()
        plain = finish(start(chunks=[], max_new_tokens=1))[0]
        driver = start(chunks=[], max_new_tokens=1)
        driver.command(f"until {site}")
        result = driver.command(f"route {site}=off")
        changed = result["changed"][0]
        assert changed["before"]["implementation"] == "reference"
        assert changed["after"]["implementation"] == "off" and changed["effect"] == ""
        assert changed["before"]["hash"] != changed["after"]["hash"]
        assert torch.equal(finish(driver)[0], expected)
        assert not torch.equal(expected, plain)


def test_a_switch_that_changes_nothing_says_so(start):
    with implementations(hc_post__mine=lambda *a, **k: reference("hc_post")(*a, **k)):
        driver = start()
        driver.command("until L0/attn/hc_post")
        changed = driver.command("route */hc_post=mine")["changed"]
        assert len(changed) == 8  # two a layer
        effects = {c["site"]: c["effect"] for c in changed}
        assert effects["L0/attn/hc_post"] == "NO EFFECT: same output bits"
        assert effects["L1/attn/hc_post"] == ""  # nobody knows yet
        again = driver.command("route L0/attn/hc_post=mine")["changed"]
        assert again[0]["effect"] == "NO EFFECT: both are mine"
        stamp = next(s for s in driver.command("stamps")["stamps"] if s["site"].endswith("hc_post"))
        assert (stamp["implementation"], stamp["launches"]) == ("mine", 1)


def test_a_route_that_fails_leaves_everything_as_it_was(start):
    def broken(*args, **params):
        raise RuntimeError("smem\ntoo large")

    def everything(driver):
        stamps, value = driver.command("stamps"), driver.command("print o")
        return stamps, value, driver.command("route")["route"]

    with implementations(attention__broken=broken):
        driver = start()
        driver.command("until L1/attn/core")
        before = everything(driver)
        for bad, code in (
            ("*/core=broken", 2),
            ("*/core=nothing", 2),
            ("*/cor=broken", 2),
            ("*/hc_post=broken", 3),
        ):
            with pytest.raises(DSV4Error) as error:
                driver.command(f"route {bad}")
            assert error.value.exit_code == code, bad
        assert everything(driver) == before


def test_toggle_goes_between_reference_and_kernel(start):
    driver = start()
    driver.command("until L1/attn/core")
    first = driver.command("toggle")["changed"][0]
    if first["after"]["implementation"] == "reference":
        assert first["effect"].startswith("NO EFFECT: both are reference (cpu: ")
    else:
        assert driver.command("toggle")["changed"][0]["after"]["implementation"] == "reference"
    with pytest.raises(DSV4Error, match="no site"):
        start().command("toggle")


# ------------------------------------------------------------------------------ failing ops


def test_an_op_that_raises_waits_for_another_route_or_a_retry(start):
    faults = [RuntimeError("launch failed\nmore"), ValueError("once more"), SystemExit(3)]

    def failing(*args, **params):
        args[0].mul_(1)
        if faults:
            raise faults.pop(0)
        return reference("cache_write")(*args, **params)

    def fatal(*args, **params):
        args[2].fill_(7)  # half done, then
        raise RuntimeError("no")

    with implementations(cache_write__failing=failing, cache_write__fatal=fatal):
        driver = start(route=["L0/attn/window_write=failing"])
        expected = finish(start())[0]
        state = driver.command("continue")
        assert state["state"] == "failed"
        assert state["why"] == ("L0/attn/window_write (failing) raised RuntimeError: launch failed")
        assert driver.command("op")["held"] is True
        assert "ValueError" in driver.command("step")["why"]  # a retry that fails
        assert "SystemExit" in driver.command("step")["why"]
        with pytest.raises(DSV4Error, match="fatal raised"):
            driver.command("route L0/attn/window_write=fatal")
        assert driver.command("status")["state"] == "failed"
        state = driver.command("route L0/attn/window_write=reference")["state"]
        assert state["state"] == "stopped"
        assert driver.command("step")["site"] == "L0/attn/core"  # the next op, not the same again
        assert torch.equal(finish(driver)[0], expected)


@pytest.mark.parametrize(
    "result",
    [None, torch.zeros(3), (torch.zeros(3),) * 2, (1, 2, 3)],
    ids=["none", "one", "two", "ints"],
)
def test_outputs_that_break_the_contract_fail_at_their_op(start, result):
    with implementations(hc_pre__wrong=lambda *a, **k: result):
        driver = start(route=["L1/attn/hc_pre=wrong"])
        state = driver.command("continue")
        assert (state["state"], state["site"]) == ("failed", "L1/attn/hc_pre")
        assert "its contract says (u, post, comb)" in state["why"]
        driver.command("route reference")
        assert finish(driver)[0] is not None


def test_a_wrong_shape_that_breaks_the_code_between_ops_is_survived(start, straight):
    """wq_b's output is reshaped by the model itself, outside of any op."""
    with implementations(linear__short=lambda x, **k: reference("linear")(x, **k)[:, :-1]):
        driver = start(route=["L1/attn/wq_b=short"])
        state = driver.command("continue")
        assert state["state"] == "failed"
        assert state["why"].startswith("after L1/attn/wq_b: RuntimeError")
        driver.command("route reference")
        logits, tokens = finish(driver)
    assert torch.equal(logits, straight[0]) and tokens == straight[1]


# ------------------------------------------------------------------------------ probes and shadow


def test_probes_and_shadow_change_no_bit(start, straight):
    driver = start(probes=["all"], shadow="*", route=["kernel"])
    seen = finish(driver)[0].clone()
    plain = start(route=["kernel"])
    assert torch.equal(seen, finish(plain)[0])
    assert driver.command("readings")["readings"] and not plain.command("readings")["readings"]


def test_probes_can_be_chosen_at_any_stop(start):
    driver = start()
    driver.command("until L0/attn/core")
    state = driver.command("probes stats, softmax")
    assert state["probes"] == ["stats", "softmax"] and "residual" in state["known_probes"]
    assert {r["probe"] for r in driver.command("readings L0/attn/core")["readings"]} == {
        "stats",
        "softmax",
    }
    assert driver.command("probes none")["probes"] == []
    assert len(driver.command("probes all")["probes"]) == len(PROBES)
    with pytest.raises(DSV4Error) as error:
        driver.command("probes statz")
    assert "stats" in error.value.hint
    assert len(driver.command("status")["probes"]) == len(PROBES)


def test_a_probe_that_raises_is_an_alarm_not_the_end(start):
    @probe
    class Buggy(Probe):
        name = "buggy"

        def wants(self, site):
            return site.op == "gate"

        def observe(self, call):
            raise KeyError("nothing")

    try:
        driver = start(probes=["buggy", "stats"])
        driver.command("until L1/ffn/gate")
        readings = driver.command("readings L1/ffn/gate")["readings"]
        assert [r["verdict"] for r in readings if r["probe"] == "buggy"] == ["alarm"]
        assert any(r["probe"] == "stats" for r in readings)
        logs = [e["text"] for e in driver.kinds("log")]
        assert len(logs) == 1 and "probe buggy raised KeyError" in logs[0]
    finally:
        del PROBES["buggy"]


def test_shadow_has_errors_and_both_times(start):
    with implementations(linear__off=scaled("linear", 1.01)):
        driver = start(route=["L0/attn/wq_a=off"])
        driver.command("shadow L0/attn/w*")
        driver.command("until L0/attn/wq_a")
        view = driver.command("op")
        assert set(view["times"]) == {"off", "reference"}
        assert view["own_error"]["relative_l2"] == pytest.approx(0.01, rel=1e-3)
        assert driver.command("shadow off")["shadow"] == "off"
        assert driver.command("op")["own_error"] is None
        with pytest.raises(DSV4Error):
            driver.command("shadow */nowhere")


def test_a_shadow_that_raises_is_an_alarm(start):
    def broken(*args, **params):
        raise RuntimeError("no such instruction")

    with implementations(gather_swa__cpu=broken):
        driver = start(shadow="*/gather_swa")
        state = driver.command("until L1/attn/gather_swa")
        assert state["state"] == "stopped"
        view = driver.command("op")
        assert view["alarm"] == "error: cpu raised RuntimeError: no such instruction"


# ------------------------------------------------------------------------------ looking


def test_print_eval_and_watch(start):
    driver = start()
    with pytest.raises(DSV4Error, match="no op is held"):
        driver.command("print x")
    driver.command("watch o.abs().max()")
    driver.command("watch len(missing)")
    state = driver.command("until L0/attn/core")
    assert float(state["watches"][0]["text"].strip("tensor()")) > 0
    assert "NameError" in state["watches"][1]["error"]
    shown = driver.command("print o[0, 0, :3]")
    assert (shown["shape"], shown["dtype"]) == ([3], "float32")
    assert driver.command("eval torch.equal(o, o) and F.relu(o).min() >= 0")["text"].endswith(
        "(True)"
    )
    assert driver.command("p q.shape")["text"].startswith("torch.Size([130, 4")
    for bad in ("o[", "1/0", "exit()", "o[999]", "import os", "x = 3"):
        with pytest.raises(DSV4Error) as error:
            driver.command(f"print {bad}")
        assert "names: q, window" in error.value.hint
    assert len(driver.command("watch len(missing)")["watches"]) == 1


def test_op_shows_what_in_place_arguments_were_before(start):
    driver = start()
    driver.command("until L0/attn/window_write")
    view = driver.command("op")
    before = next(t for t in view["inputs"] if t["name"] == "cache")
    after = next(t for t in view["outputs"] if t["name"] == "cache")
    assert before["stats"]["abs_max"] == 0 < after["stats"]["abs_max"]
    other = driver.command("op L0/attn/wq_a")
    assert not other["held"] and other["inputs"] == [] and other["state"] == "done"
    with pytest.raises(DSV4Error, match="no site"):
        driver.command("op L0/attn/wq")


def test_sites_show_what_is_done(start):
    driver = start()
    driver.command("break L1/attn/core")
    driver.command("until L0/attn/wq_a")
    rows = {row["path"]: row for row in driver.command("sites")["sites"]}
    assert rows["embed"]["state"] == "done" and rows["L0/attn/wq_a"]["state"] == "current"
    assert rows["L1/attn/core"]["state"] == "pending" and rows["L1/attn/core"]["break"]
    driver.command("back 2")
    rows = {row["path"]: row for row in driver.command("sites")["sites"]}
    assert rows["L0/attn/wq_a"]["state"] == "pending"


def test_looking_sends_no_state_and_the_state_precedes_the_reply(start):
    driver = start()
    driver.command("step")
    kinds = [e["event"] for e in driver.events if e["event"] in ("state", "reply")]
    assert kinds[-2:] == ["state", "reply"]
    count = len(driver.kinds("state"))
    for line in ("op", "sites", "readings", "status", "breaks", "print x"):
        driver.command(line)
    assert len(driver.kinds("state")) - count <= 1  # `breaks` belongs to the Break group
