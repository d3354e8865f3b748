"""Nsight Compute: its csv, damaged ones, and what is said where it cannot run"""

from __future__ import annotations

import pytest

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.timing import ncu
from dsv4_bench.workbench.timing.document import ncu_report, short_name

HEAD = (
    '"ID","Process ID","Kernel Name","dsv4:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg",'
    '"gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"launch__registers_per_thread",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"'
)
UNITS = '"","","","","ns","%","register/thread","inst","inst"'
RANGES = '"<default>,<measure:none>,<L12/attn/core:none>,<sm90:none>"'


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    rows = f'"0","77","attn_decode",{RANGES},"12,345","83.5","168","9.25","0.5"'
    path.write_text(f"==PROF== Connected\n{HEAD}\n{UNITS}\n{rows}\n")
    return path


def test_rows_have_their_site_and_numbers(log):
    (row,) = ncu.read(log)
    assert (row["site"], row["kernel"]) == ("L12/attn/core", "attn_decode")
    assert row["seconds"] == pytest.approx(12.345e-6)
    assert (row["dram"], row["registers"], row["compute"]) == (83.5, 168, None)
    assert row["stalls"] == {"long_scoreboard": 9.25, "barrier": 0.5}


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch, log):
    """An `ncu` that answers with `log`, or with timed.csv where no cache is emptied."""
    (tmp_path / "timed.csv").write_text(log.read_text().replace("12,345", "6,000"))
    script = tmp_path / "ncu"
    script.write_text(
        "#!/bin/sh\nfor word; do [ $last = --log-file ] && out=$word; last=$word; done 2>/dev/null\n"
        f'case "$*" in *"--cache-control none"*) cp {tmp_path}/timed.csv $out;; *) cp {log} $out;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_times_are_asked_without_emptying_the_caches(fake_ncu):
    (row,) = ncu.record(fake_ncu / "out.csv", ["child"])
    assert row["seconds"] == pytest.approx(6e-6) and row["cold"] == pytest.approx(12.345e-6)
    assert row["dram"] == 83.5
    assert "| 6.0 | 12.3 | 84 % |" in ncu_report([row]).replace("  ", " ")


def test_runs_that_launched_other_kernels_are_not_mixed(fake_ncu):
    timed = fake_ncu / "timed.csv"
    timed.write_text(timed.read_text().replace("attn_decode", "attn_prefill"))
    (row,) = ncu.record(fake_ncu / "out.csv", ["child"])
    assert row["seconds"] is None and row["cold"] == pytest.approx(12.345e-6)
    assert ncu_report([row])


def test_what_ncu_says_when_it_fails(fake_ncu):
    (fake_ncu / "ncu").write_text("#!/bin/sh\necho no permission >&2\nexit 5\n")
    with pytest.raises(DSV4Error, match="under ncu: no permission") as caught:
        ncu.record(fake_ncu / "out.csv", ["child"])
    assert caught.value.exit_code == 5


def test_short_names_of_kernels():
    names = {
        "void dsv4::(anonymous namespace)::norm_kernel<__nv_bfloat16, 4>(dsv4::Rows)": "norm_kernel<__nv_bfloat16, 4>",
        "void dsv4::<unnamed>::norm_kernel<(int)3>(const T1 *)": "norm_kernel<(int)3>",
        "dsv4_linear_fp8_f32_128_0": "dsv4_linear_fp8_f32_128_0",
        "Memcpy DtoH (Device -> Pinned)": "Memcpy DtoH (Device -> Pinned)",
        "aten::empty": "aten::empty",
    }
    assert {name: short_name(name) for name in names} == names


@pytest.mark.parametrize("text", ["", "==ERROR== no permission\n", "\x00\xff binary"])
def test_what_is_no_table(log, text):
    log.write_text(text)
    with pytest.raises(DSV4Error, match="no table") as caught:
        ncu.read(log)
    assert caught.value.exit_code == 4


def test_without_a_gpu_the_command_for_another_machine_is_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv4_bench.workbench.cli.profile._has_cuda", lambda: False)
    assert cli.main(["profile", "--layer", "12", "--ncu"]) == 3
    err = capsys.readouterr().err
    assert "no CUDA device" in err and "ncu --clock-control none" in err
