"""What this machine has of huge pages."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest

from tests.eventually import eventually

_COUNTS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def free_huge_pages() -> int:
    """Those that nobody has, or was promised."""
    try:
        free, promised = (int((_COUNTS / f"{what}_hugepages").read_text()) for what in ("free", "resv"))
    except OSError:
        return 0
    return free - promised


def need_huge_pages(number: int) -> None:
    """Skips the test where so many are not free now: servers of earlier tests may not have given theirs back yet."""
    gc.collect()
    if not eventually(lambda: free_huge_pages() >= number, 2):
        pytest.skip(f"needs {number} free huge pages: sysctl vm.nr_hugepages")


def page_sizes_of_slabs() -> set[int]:
    """Bytes; of all shared slabs that this process has mapped."""
    sizes, in_slab = set(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            in_slab = "lmcache-slab" in line
        elif in_slab and line.startswith("KernelPageSize:"):
            sizes.add(int(line.split()[1]) << 10)
    return sizes
