"""Routes, sites, stamps, plugins, and the cost of every op."""

from __future__ import annotations

import pytest
import torch
from driver import implementations

from dsv4_bench.engine import registry
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.formats import Weight, quantize_nvfp4
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import (
    OPS,
    Context,
    Site,
    choose,
    implementation,
    parse_route,
    reference,
    select_sites,
    spec_of,
)
from dsv4_bench.engine.step import Step
from dsv4_bench.workbench.loading import load_plugins

MINE = """
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="hc_post", name="mine")       # same signature and contract as the op's reference
def hc_post_mine(*args, **kwargs):
    return reference("hc_post")(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return Transformer(Checkpoint(make_checkpoint()))


@pytest.fixture(autouse=True)
def clean(model):
    yield
    model.set_route(parse_route(["reference"]))


def passing(op):
    return lambda *args, **params: reference(op)(*args, **params)


# ------------------------------------------------------------------------------ routes


def test_later_entries_win(model):
    with implementations(hc_post__a=passing("hc_post"), hc_post__b=passing("hc_post")):
        model.set_route(parse_route(["reference", "*/hc_post=a,L1/*=reference", "L1/ffn/*=b"]))
        used = {p: s.stamp.implementation for p, s in model.sites.items() if s.op == "hc_post"}
        assert used["L0/ffn/hc_post"] == used["L2/attn/hc_post"] == "a"
        assert (used["L1/attn/hc_post"], used["L1/ffn/hc_post"]) == ("reference", "b")
        assert [str(e) for e in model.route][1] == "*/hc_post=a"
        model.set_route(parse_route(["reference"]))


def test_a_family_falls_back_with_a_note(model):
    with implementations(hc_post__only=passing("hc_post")):
        model.set_route(parse_route(["only"]))
        assert model.sites["L0/attn/hc_post"].stamp.note == ""
        stamp = model.sites["L0/attn/core"].stamp
        assert (stamp.implementation, stamp.note) == (
            "reference",
            "only: not implemented for attention",
        )
        model.set_route(parse_route(["reference"]))


def test_the_kernel_family_says_why_it_is_the_reference():
    impl, note = choose("hc_post", "kernel", Context("abacus"))
    assert (impl.name, note) == ("reference", "no kernel for abacus")


@pytest.mark.parametrize(
    ("text", "kind", "message", "hint"),
    [
        ("*/hc_post=min", DSV4Error, "unknown implementation 'min'", "did you mean 'mine'?"),
        ("*/hc_pots=mine", DSV4Error, "no site matches '*/hc_pots'", "'*/hc_post'"),
        ("L1/atn/core=mine", DSV4Error, "no site matches", "'L1/attn/core'"),
        ("L1/attn/core=mine", CannotAnswer, "mine: not implemented for attention", "kernels"),
        ("*/hc_post=far", CannotAnswer, "far: needs sm_100, this is cpu", "kernels"),
        ("=", DSV4Error, "unknown implementation ''", "known: "),
    ],
)
def test_a_bad_route_changes_nothing(model, text, kind, message, hint):
    with implementations(hc_post__mine=passing("hc_post")):
        implementation(
            op="hc_post", name="far", requires=lambda c: f"needs sm_100, this is {c.device}"
        )(passing("hc_post"))
        try:
            model.set_route(parse_route(["reference", "L0/attn/hc_post=mine"]))
            model.sites["L0/attn/hc_post"].stamp.launches = 7
            before = {p: (s.impl, s.stamp) for p, s in model.sites.items()}
            route = model.route
            with pytest.raises(kind) as error:
                model.set_route(parse_route(["L0/ffn/hc_post=mine", text]))
            assert message in error.value.message and hint in error.value.hint
            assert error.value.exit_code == (3 if kind is CannotAnswer else 2)
            assert {p: (s.impl, s.stamp) for p, s in model.sites.items()} == before
            assert model.route is route
        finally:
            del registry.IMPLEMENTATIONS["hc_post"]["far"]
            model.set_route(parse_route(["reference"]))


def test_sites_are_selected_by_glob_or_group(model):
    group = select_sites(model.sites.values(), "L1/attn/compressor")
    assert [s.path.rpartition("/")[2] for s in group] == [
        "wkv",
        "wgate",
        "pool",
        "norm",
        "rope",
        "write",
    ]
    assert len(select_sites(model.sites.values(), "*/core")) == 4
    with pytest.raises(DSV4Error):
        select_sites(model.sites.values(), "L11")


# ------------------------------------------------------------------------------ stamps, plugins


def test_stamps_count_launches_and_start_over_with_a_switch():
    site = Site("x", spec_of("moe_sum"), {"dtype": torch.float32}, None)
    first = site.stamp.hash
    args = (torch.ones(2, 2), torch.ones(2, 2))
    site.run(args)
    site.run(args)
    assert (site.stamp.launches, len(first)) == (2, 12)
    with implementations(moe_sum__other=passing("moe_sum")):
        site.use(registry.IMPLEMENTATIONS["moe_sum"]["other"])
        assert site.stamp.launches == 0 and site.stamp.hash != first
        site.put_back(registry.IMPLEMENTATIONS["moe_sum"]["reference"], site.stamp)


def test_constants_are_bound_whatever_the_function_is():
    def plain(x, y=2, *, a, b=4):
        return x, y, a, b

    class Callable:
        def __call__(self, x, **params):
            return x, params

    bind = registry.with_constants
    assert bind(plain, {}) is plain
    assert bind(plain, {"a": 3})(1) == (1, 2, 3, 4)
    assert bind(plain, {"a": 3, "b": 5})(1, 6) == (1, 6, 3, 5)
    assert plain(1, a=0) == (1, 2, 0, 4)  # itself unchanged
    assert bind(lambda x, **params: (x, params), {"a": 3})(1) == (1, {"a": 3})
    assert bind(Callable(), {"a": 3})(1) == (1, {"a": 3})
    assert bind(lambda a, x=0: (a, x), {"x": 3})(1) == (1, 3)
    with pytest.raises(TypeError):
        bind(plain, {"nothing": 3})(1, a=1)


def test_code_decides_the_hash():
    one = registry.Implementation("x", "a", lambda: 1, code=lambda: "nvcc 12.9 key 1")
    two = registry.Implementation("x", "a", lambda: 1, code=lambda: "nvcc 12.9 key 2")
    assert one.hash != two.hash


def test_the_documented_plugin_runs(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    try:
        load_plugins([str(file)])
        model.set_route(parse_route(["reference", "*/hc_post=mine"]))
        assert model.sites["L2/attn/hc_post"].stamp.implementation == "mine"
        model.set_route(parse_route(["reference"]))
    finally:
        registry.IMPLEMENTATIONS["hc_post"].pop("mine", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("import no_such_module_here", "ModuleNotFoundError"),
        (MINE.replace("hc_post", "hc_pst", 1), "unknown op 'hc_pst'"),
        (MINE.replace('"mine"', '"reference"'), "may not be called 'reference'"),
    ],
)
def test_plugin_errors_are_one_line(tmp_path, text, message, capsys):
    file = tmp_path / "plugin.py"
    file.write_text("print('loading')\n" + text)
    with pytest.raises(DSV4Error) as error:
        load_plugins([str(file)])
    assert str(file) in error.value.message and message in error.value.message
    assert "\n" not in error.value.message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_a_plugin_must_be_a_file(name):
    with pytest.raises(DSV4Error, match="no such plugin file"):
        load_plugins([name])


# ------------------------------------------------------------------------------ cost

N, HC, D = 3, 4, 32  # tokens, streams, width
F32 = 4


def dense(n, k, dtype=torch.float32):
    return Weight("w", "dense", torch.ones(n, k, dtype=dtype))


def nvfp4(n, k):
    data, scale, _ = quantize_nvfp4(torch.ones(n, k))
    return Weight("w", "nvfp4", data, scale)


def step(start, length):
    return Step(torch.zeros(length, dtype=torch.int64), (start,), (length,), 8)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


_MIX = (2 + HC) * HC
_HYPER = {"fn": zeros(_MIX, HC * D), "scale": zeros(3), "base": zeros(_MIX)}
_EXPERT = Expert(nvfp4(16, D), nvfp4(D, 16), nvfp4(16, D))
_EXPERT_BYTES = 3 * (16 * D // 2 + 16 * D // 16)

# op: arguments, parameters, bytes, flops; the numbers written out by hand
COSTS = {
    "embed": (
        (ids(1, 1, 5),),
        {"weight": dense(1000, D, torch.bfloat16), "hc": HC, "dtype": torch.float32},
        3 * 8 + 3 * D * 2 + N * HC * D * F32,
        0,
    ),
    "hc_pre": (
        (zeros(N, HC, D),),
        {**_HYPER, "iters": 2, "eps": 1e-6, "norm_eps": 1e-6},
        F32 * (N * HC * D + _MIX * HC * D + 3 + _MIX + N * D + N * HC + N * HC * HC),
        2 * N * HC * D * (_MIX + 2),
    ),
    "hc_post": (
        (zeros(N, D), zeros(N, HC, D), zeros(N, HC), zeros(N, HC, HC)),
        {},
        F32 * (N * D + N * HC * D + N * HC + N * HC * HC + N * HC * D),
        2 * N * HC * D * (HC + 1),
    ),
    "hc_head": (
        (zeros(N, HC, D),),
        {"fn": zeros(HC, HC * D), "scale": zeros(1), "base": zeros(HC), "eps": 0, "norm_eps": 0},
        F32 * (N * HC * D + HC * HC * D + 1 + HC + N * D),
        2 * N * HC * D * (HC + 2),
    ),
    "rms_norm": (
        (zeros(N, D),),
        {"weight": zeros(D), "eps": 1e-6},
        F32 * (2 * N * D + D),
        4 * N * D,
    ),
    "linear": (
        (zeros(N, D),),
        {"weight": nvfp4(48, D), "out_dtype": None},
        F32 * N * D + 48 * D // 2 + 48 * D // 16 + F32 * N * 48,
        2 * N * 48 * D,
    ),
    "grouped_linear": (
        (zeros(N, 2 * D),),
        {"weight": dense(8, D), "groups": 2},
        F32 * (N * 2 * D + 8 * D + N * 8),
        2 * N * 8 * D,
    ),
    "rope": (
        (zeros(N, D), ids(0, 1, 2)),
        {"freqs": zeros(4), "inverse": False},
        F32 * 2 * N * D + 3 * 8 + 4 * F32,
        6 * N * 4,
    ),
    "cache_write": (  # one of three rows is skipped; the rest of the cache is not touched
        (zeros(N, D), ids(0, -1, 2), zeros(100, D, dtype=torch.bfloat16)),
        {},
        3 * 8 + 2 * D * (F32 + 2),
        0,
    ),
    "gather_swa": ((zeros(8, D), zeros(N, D)), {}, F32 * 2 * (8 + N) * D, 0),
    "compressor": (  # two windows of 2 close; both states are read and written
        (zeros(5, D), zeros(5, D), zeros(1, 2, D), zeros(1, 2, D), step(0, 5)),
        {"ape": zeros(2, D)},
        F32 * D * (5 + 5 + 2 * (2 + 2) + 2 + 2),
        0,
    ),
    "index_score": (  # 9 tokens: 2 of the 16 entries exist
        (zeros(9, 2, 8), zeros(1, 16, 8), zeros(9, 2), step(0, 9)),
        {"scale": 1.0, "ratio": 4},
        F32 * (9 * 2 * 8 + 2 * 8 + 9 * 2 + 9 * 2),
        2 * 9 * 2 * (8 + 1) * 2,
    ),
    "index_topk": (
        (zeros(N, 6), ids(6, 6, 6)),
        {"k": 2},
        F32 * N * 6 + 3 * 8 + 4 * N * 2,
        0,
    ),
    "attention": (  # of 50 and 100 rows in the pools, 2 and 1 are attended to
        (
            zeros(2, 4, D),
            zeros(50, D),
            ids([0, 1], [1, -1], dtype=torch.int32),
            zeros(100, D, dtype=torch.bfloat16),
            ids([-1], [7], dtype=torch.int32),
        ),
        {"sink": zeros(4), "scale": 1.0},
        F32 * (2 * 4 * D + 4 + 2 * 2 + 2 * 1 + 2 * D + 2 * 4 * D + 2 * 4) + 2 * D,
        4 * 2 * 4 * D * 3,
    ),
    "experts": (  # of 50 experts, 2 are chosen
        (zeros(N, D), zeros(N, 2), ids([1, 7], [7, 1], [1, 7], dtype=torch.int32)),
        {"bank": [_EXPERT] * 50, "limit": 10.0},
        2 * _EXPERT_BYTES + F32 * (N * D + 2 * N + 2 * N + N * D),
        6 * 16 * D * 2 * N,
    ),
    "shared_expert": (
        (zeros(N, D),),
        {"expert": _EXPERT, "limit": 10.0},
        _EXPERT_BYTES + F32 * 2 * N * D,
        6 * 16 * D * N,
    ),
    "moe_sum": ((zeros(N, D), zeros(N, D)), {"dtype": torch.bfloat16}, N * D * (4 + 4 + 2), 0),
}


@pytest.mark.parametrize("op", COSTS)
def test_cost(op):
    args, params, total, flops = COSTS[op]
    cost = OPS[op].cost(args, params, reference(op)(*args, **params))
    assert (cost.bytes, cost.flops) == (total, flops)


def test_cost_of_the_gate():
    x, weight = zeros(N, D), dense(8, D)
    params = {"weight": weight, "bias": zeros(8), "tid2eid": None, "k": 2, "scale": 1.5}
    args = (x, ids(1, 2, 3))
    result = reference("gate")(*args, **params)
    outputs = sum(t.nbytes for t in OPS["gate"].name_outputs(result).values())
    cost = OPS["gate"].cost(args, params, result)
    assert cost.bytes == x.nbytes + 3 * 8 + weight.nbytes + 8 * F32 + outputs
    assert cost.flops == 2 * N * 8 * D


def test_every_op_has_a_tested_cost():
    assert set(OPS) == {*COSTS, "gate"}
