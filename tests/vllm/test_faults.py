"""Nothing that happens to the cache fails a request, on a real vLLM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB that only this test uses: the way to fill it, or make it read-only, for root too."""
    mount = tmp_path / "mount"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def check(served: dict, fault: str) -> None:
    answer = served["answers"][fault]
    text = answer["expected"][0]["tokens"]
    assert answer["hurt"][0]["tokens"] == text, fault
    assert answer["healed"][0]["tokens"] == text, fault


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
def test_damaged_files_are_misses(connector: str, tmp_path: Path) -> None:
    faults = ["truncated", "bit_flipped", "swapped", "unlinked", "vanished"]
    served = run("disk_faults", directory=str(tmp_path / "cache"), faults=faults, connector=connector)
    for fault in faults:
        check(served, fault)
        answer = served["answers"][fault]
        assert answer["hurt"][0]["reuse"]["reused_tokens"] == 0, fault
        assert any("failure" in name for name in answer["counted"]), f"{fault} must be counted"
    assert served["leaks"] == []


def test_full_and_read_only_disks(small_mount: Path) -> None:
    faults = ["full", "read_only"]
    served = run("disk_faults", directory=str(small_mount), faults=faults)
    for fault in faults:
        check(served, fault)
    assert served["leaks"] == []


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_an_exception_of_ours_never_reaches_vllm(connector: str, layerwise: bool) -> None:
    """Invariant 4, for every call that the adapter makes."""
    served = run("raising_calls", connector=connector, config={"use_layerwise": layerwise})
    text = served["expected"][0]["tokens"]
    for call, answer in served["answers"].items():
        assert answer[0]["tokens"] == text, call
    assert served["answers"]["healed"][0]["reuse"]["reused_tokens"] == 512
    assert served["leaks"] == []


def test_what_was_computed_behind_a_failed_load_is_not_kept() -> None:
    """Invariant 3: the forward of that step ran on pages that were not filled."""
    served = run("failed_load")
    text = served["plain"][0]["tokens"]
    assert served["hurt"][0]["tokens"] == text
    assert served["again"][0]["tokens"] == text
    assert served["again"][0]["reuse"]["reused_tokens"] == 384
