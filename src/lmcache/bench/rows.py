"""``Row``: one measured figure, and what it is measured against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the runs."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        figure: what was measured; ``case`` says on what.
        value: median of the runs, in ``unit``.
        baseline: what ``raw`` is, in words.
        raw: the same bytes or calls without us, in ``unit``.
        share: our speed as a share of the raw speed, taken in each run by itself.
        min_share: the target for ``share``.
        max_value: the target for ``value``.
        entries: chunks that the index held, where the figure is told for several such numbers.
    """

    subject: str
    figure: str
    case: str
    unit: str
    value: float
    baseline: str = ""
    raw: float | None = None
    share: Spread | None = None
    min_share: float | None = None
    max_value: float | None = None
    entries: int | None = None

    @property
    def target(self) -> str:
        """The target in words; empty when there is none."""
        if self.min_share is not None:
            return f"≥ {self.min_share:.0%} of raw"
        return f"≤ {self.max_value:g} {self.unit}" if self.max_value is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when there is none."""
        if self.min_share is not None and self.share is not None:
            return self.share.median >= self.min_share
        return self.value <= self.max_value if self.max_value is not None else None


class CannotMeasureError(RuntimeError):
    """This machine, or the directory given, lacks what a subject is about. The message says what to change."""
