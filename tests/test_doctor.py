"""The environment report: complete, honest about what is missing, and nothing private in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_bench.workbench import doctor
from dsv4_bench.workbench.cli import main
from dsv4_bench.workbench.doctor import REDACTED, Check, is_secret, reported_variables, scrub

SECRET = "hunter2-sesame"
UUID = "1b2c3d4e-0000-1111-2222-333344445555"


# ------------------------------------------------------------------------------ privacy


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "hf_token", "DSV4_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_PASSWORD",
        "GOOGLE_APPLICATION_CREDENTIALS", "CUDA_LICENSE_KEY", "TORCH_SECRET_X", "MyPassword",
    ],
)  # fmt: skip
def test_variables_that_may_hold_secrets_are_redacted(name: str) -> None:
    assert is_secret(name)
    assert scrub({name: SECRET}) == {name: REDACTED}
    assert scrub({"outer": {name: SECRET}}) == {"outer": {name: REDACTED}}
    text = scrub(f"started with {name}={SECRET} and {name}: '{SECRET}'")
    assert SECRET not in text
    assert name in text


@pytest.mark.parametrize(
    "text",
    [
        f"--api-key {SECRET}",
        f"--api-key={SECRET}",
        f'{{"token": "{SECRET}"}}',
        f"https://user:{SECRET}@example.org/simple",
        f"https://{SECRET}@example.org",
        f"Authorization: Bearer {SECRET}",
        f"export WANDB_API_KEY={SECRET};",
    ],
)
def test_secrets_inside_texts_are_redacted(text: str) -> None:
    assert SECRET not in scrub(text)
    assert REDACTED in scrub(text)


def test_gpu_uuids_are_stripped() -> None:
    text = f"GPU 0: NVIDIA H100 (UUID: GPU-{UUID}) MIG-GPU-{UUID}/3/0 MIG-{UUID} gpu-{UUID.upper()}"
    clean = scrub(text)
    assert UUID not in clean.lower()
    assert "NVIDIA H100" in clean
    assert reported_variables({"CUDA_VISIBLE_DEVICES": f"GPU-{UUID}"}) == {
        "CUDA_VISIBLE_DEVICES": "[uuid]"
    }


def test_home_paths_are_shortened() -> None:
    home = "/data/people/alice"
    assert scrub(f"{home}/models and {home}", home) == "~/models and ~"
    assert scrub(f"LD={home}/lib:{home}/lib64", home) == "LD=~/lib:~/lib64"
    assert scrub("/data/people/alicette/x", home) == "/data/people/alicette/x"
    assert scrub("/home/bob/x:/Users/eve", home) == "/home/[user]/x:/Users/[user]"
    assert scrub("/usr/bin", "/") == "/usr/bin"


def test_ordinary_texts_stay() -> None:
    for text in ("tokenizers==0.23.3", "nvcc 13.0 (/usr/bin/nvcc)", "sm_90, 80 GiB", "a = b"):
        assert scrub(text, "/root") == text
    assert scrub([1, None, True, 2.5]) == [1, None, True, 2.5]


def test_only_variables_that_matter_are_reported() -> None:
    environment = {
        "DSV4_CACHE": "/tmp/c",
        "CUDA_HOME": "/usr/local/cuda",
        "HF_TOKEN": SECRET,
        "DSV4_EMPTY_KEY": "",
        "SLACK_WEBHOOK": "x",
        "EMAIL": "me@example.org",
    }
    assert reported_variables(environment) == {
        "CUDA_HOME": "/usr/local/cuda",
        "DSV4_CACHE": "/tmp/c",
        "DSV4_EMPTY_KEY": "",
        "HF_TOKEN": REDACTED,
    }


def test_the_whole_report_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = tmp_path / "somebody"
    (home / "cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{UUID}")
    monkeypatch.setenv("DSV4_CACHE", str(home / "cache"))
    monkeypatch.setattr(
        doctor, "torch_environment", lambda: {"x": f"PIP_TOKEN={SECRET} GPU-{UUID}"}
    )
    for arguments in (["doctor"], ["doctor", "--json"]):
        assert main(arguments) in (0, 1)
        output = capsys.readouterr()
        text = output.out + output.err
        assert SECRET not in text
        assert UUID not in text
        assert str(home) not in text
        assert "~/cache" in text


# ------------------------------------------------------------------------------ contents


def checks(**replaced: object) -> dict[str, dict[str, str]]:
    data = doctor.examine()
    return {c["name"]: c for section in data["sections"].values() for c in section}


def test_json_has_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["status"] in (doctor.OK, doctor.WARN, doctor.FAIL)
    found = {c["name"]: c for section in data["sections"].values() for c in section}
    wanted = {
        "dsv4-bench", "git", "python", "torch", "torch CUDA", "driver", "nvcc", "host compiler",
        "CPU flags", "nvidia-cutlass-dsl", "safetensors", "textual", "transformers", "cache",
        "free disk", "terminal", "nsys", "ncu",
    }  # fmt: skip
    assert wanted <= set(found)
    statuses = {doctor.OK, doctor.WARN, doctor.FAIL, doctor.NOT_CONFIGURED}
    assert {c["status"] for c in found.values()} <= statuses
    assert all(c["hint"] for c in found.values() if c["status"] == doctor.FAIL)
    assert data["torch_environment"]["torch_version"] == found["torch"]["value"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_environment", dict)


def test_missing_tools_are_not_configured_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path, cache_folder: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = checks()
    for name in ("nvcc", "nsys", "ncu"):
        assert found[name]["status"] == doctor.NOT_CONFIGURED
        assert found[name]["hint"]
    assert found["host compiler"]["status"] == doctor.WARN
    assert "g++" in found["host compiler"]["hint"]


def test_a_cache_that_cannot_be_written_fails(
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "file"))
    assert main(["doctor"]) == 1
    output = capsys.readouterr()
    assert "FAIL cache" in output.out
    assert "DSV4_CACHE" in output.out
    assert "FAIL" in output.err


def test_built_kernels_are_counted(quick: None, cache_folder: Path) -> None:
    for name in ("cpu-1", "cpu-2"):
        (cache_folder / "kernels" / name).mkdir(parents=True)
        (cache_folder / "kernels" / name / "lib.so").write_bytes(b"")
    assert "2 kernels built" in checks()["cache"]["value"]


def test_a_missing_package_fails_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    found = checks()["no-such-package"]
    assert found["status"] == doctor.FAIL
    assert found["hint"] == "pip install no-such-package"


def test_a_section_that_crashes_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def broken() -> list[Check]:
        raise RuntimeError("no such sensor")

    monkeypatch.setitem(doctor.SECTIONS, "GPU", broken)
    assert checks()["GPU"]["status"] == doctor.FAIL
    assert "no such sensor" in checks()["GPU"]["value"]


@pytest.mark.parametrize("command", ["doctor", "inspect", "make-checkpoint"])
def test_help_imports_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom dsv4_bench.workbench.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
