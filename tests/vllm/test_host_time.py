"""The benchmarks of the host's time go through all that a request does, on a connector and kernels that do nothing."""

from __future__ import annotations

import pytest

from tests.vllm.harness import run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_requests() -> None:
    printed = run_module("benchmarks.host_time", ["--lengths", "2048", "--runs", "1"], timeout=200)
    assert all(f"\n{kind} " in printed for kind in ("new", "reload", "blend"))
    assert "goes on without the cache" not in printed


def test_saves() -> None:
    printed = run_module("benchmarks.host_time.saves", ["--tokens", "2048", "--runs", "2"], timeout=200)
    assert "gather" in printed
    assert "goes on without the cache" not in printed
