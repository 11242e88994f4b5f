"""How the index behaves as it grows: a lookup of 32k tokens, memory for each chunk, starting.

Each number of chunks is measured in a process of its own. The memory tier starts empty and is filled by ``store``; the
disk tier starts on what an earlier process left.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lmcache.bench.fresh_process import Figures, in_fresh_process
from lmcache.bench.index_process import disk_index, fill_disk_index, memory_index
from lmcache.bench.rows import Row
from lmcache.bench.settings import Settings

MAX_LOOKUP_MILLISECONDS = 0.5
TARGET_ENTRIES = 100_000

# figure of a row: (figure of the process, unit, factor)
_FIGURES = {
    "lookup of 32k tokens": ("lookup seconds", "ms", 1e3),
    "… of which naming its chunks": ("hash seconds", "ms", 1e3),
    "memory for each chunk": ("bytes", "bytes", 1.0),
    "start": ("start seconds", "s", 1.0),
    "storing a chunk, without its bytes": ("store seconds", "µs", 1e6),
}


def measure_lookup(settings: Settings) -> list[Row]:
    rows = []
    for entries in settings.entries:
        rows += _rows("memory", entries, in_fresh_process(memory_index, entries))
        with tempfile.TemporaryDirectory(dir=settings.directory, prefix="lmcache-bench-") as name:
            directory = str(Path(name) / "tier")
            fill_disk_index(Path(directory), entries)
            rows += _rows("disk", entries, in_fresh_process(disk_index, directory, entries))
    order = list(_FIGURES)
    return sorted(rows, key=lambda row: (order.index(row.figure), row.case, row.entries))


def _rows(tier: str, entries: int, measured: Figures) -> list[Row]:
    return [
        Row(
            subject="lookup",
            figure=figure,
            case=f"{tier} tier",
            unit=unit,
            value=measured[name] * factor,
            max_value=MAX_LOOKUP_MILLISECONDS if name == "lookup seconds" and entries == TARGET_ENTRIES else None,
            entries=entries,
        )
        for figure, (name, unit, factor) in _FIGURES.items()
        if name in measured
    ]
