"""pytest plugin for xdist: a worker whose CUDA context a test has destroyed ends, and a new one goes on.

    pytest -p fresh_context -n 12 ...

After an illegal access every later call of that process fails, whatever test makes it.
"""

from __future__ import annotations

import os

import pytest

_SIGNS = ("CUDA error", "cudaError", "illegal memory access", "launch failure", "misaligned")
_dead = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _dead
    text = str(report.longrepr) if report.failed else ""
    _dead = _dead or any(sign in text for sign in _SIGNS)


def pytest_runtest_logfinish() -> None:
    if _dead and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
