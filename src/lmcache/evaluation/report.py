"""``Report``: all that a run found, and what it found it with; as JSON."""

from __future__ import annotations

import msgspec

from lmcache.evaluation.figures import Summary
from lmcache.evaluation.rows import BlendRow, FullPrefill, Settings
from lmcache.evaluation.variants import NotRun
from lmcache.evaluation.verdict import Verdict


class Report(msgspec.Struct, frozen=True):
    """``machine`` is one line of words; ``rows`` are those of the tasks of this run, ``seed`` made tasks and intervals.

    ``tasks`` says where the tasks are from.
    """

    machine: str
    settings: Settings
    tasks: str
    seed: int
    summary: Summary
    not_run: list[NotRun]
    full_prefills: list[FullPrefill]
    rows: list[BlendRow]

    def to_json(self, verdict: Verdict | None) -> bytes:
        """Indented JSON of all fields, and the ``verdict``."""
        report = {**msgspec.to_builtins(self), "verdict": msgspec.to_builtins(verdict)}
        return msgspec.json.format(msgspec.json.encode(report), indent=2)
