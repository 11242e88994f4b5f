"""``Report``: all rows of a run and where it ran; to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from lmcache.bench.rows import Row


@dataclass(frozen=True)
class Report:
    """``machine`` is one line of words; ``seconds`` is how long measuring took; ``notes`` tell what is missing."""

    machine: str
    seconds: float
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> bytes:
        """Indented JSON. Rows have ``target`` (in words) and ``met`` beside their fields."""
        report: dict[str, Any] = asdict(self)
        for fields, row in zip(report["rows"], self.rows, strict=True):
            fields |= {"target": row.target, "met": row.met}
        return msgspec.json.format(msgspec.json.encode(report), indent=2)

    @classmethod
    def from_json(cls, data: bytes) -> Report:
        """Raises:
        msgspec.ValidationError: ``data`` is not what :meth:`to_json` gives.
        """
        return msgspec.json.decode(data, type=cls)
