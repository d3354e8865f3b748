"""Nsight Compute: its csv, damaged ones, and what is said where it cannot run"""

from __future__ import annotations

import pytest

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.timing import ncu
from dsv4_bench.workbench.timing.document import ncu_report

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
    assert "| L12/attn/core | attn_decode | 12.3 | 84 % |" in ncu_report([row]).replace("  ", " ")


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
