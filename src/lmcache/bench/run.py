"""Which subjects there are, and measuring them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module

from lmcache.bench.machine import describe_machine
from lmcache.bench.report import Report
from lmcache.bench.rows import CannotMeasureError, Row
from lmcache.bench.settings import Settings

SUBJECTS = ("keys", "memory", "pages", "disk", "lookup", "startup")
"""A module each beside this one, with a function ``measure_<subject>``."""


def measure(subjects: Sequence[str], settings: Settings, progress: Callable[[str], None]) -> Report:
    """Measure ``subjects`` in turn. ``progress`` is told each before it starts.

    What cannot be measured here becomes a note in the report.
    """
    rows: list[Row] = []
    notes = []
    machine = describe_machine()
    start = time.monotonic()
    for subject in subjects:
        progress(subject)
        try:
            rows += getattr(import_module(f"lmcache.bench.{subject}"), f"measure_{subject}")(settings)
        except CannotMeasureError as error:
            notes.append(f"{subject}: {error}")
    return Report(machine, round(time.monotonic() - start, 1), rows, notes)
