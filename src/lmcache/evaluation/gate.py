"""The gate: how good a blend must be to be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.figures import Figures


class Condition(msgspec.Struct, frozen=True):
    """``figure`` of a variant must be at most (``kl``, ``time``) or at least (the others) ``limit``."""

    figure: str
    limit: float

    @property
    def is_maximum(self) -> bool:
        return self.figure in _AT_MOST

    def failure(self, figures: Figures) -> str | None:
        """What is wrong with ``figures``; None when they meet the condition. Means count, not their intervals."""
        value = _VALUES[self.figure](figures)
        if value is None:
            return f"{self.figure} cannot be told: full prefill answers none of the tasks"
        if value <= self.limit if self.is_maximum else value >= self.limit:
            return None
        return f"{self.figure} is {value:.3g}, must be at {'most' if self.is_maximum else 'least'} {self.limit:g}"


class Gate(msgspec.Struct, frozen=True):
    """All conditions must be met."""

    conditions: tuple[Condition, ...]

    def failures(self, figures: Figures) -> list[str]:
        """What is wrong with ``figures``, a line a condition."""
        found = (condition.failure(figures) for condition in self.conditions)
        return [failure for failure in found if failure is not None]

    def __str__(self) -> str:
        return ", ".join(f"{c.figure} {'≤' if c.is_maximum else '≥'} {c.limit:g}" for c in self.conditions)


def parse_gate(text: str) -> Gate:
    """A gate from ``kl=0.1,agreement=0.8``.

    Raises:
        EvaluationError: not of that form, no such figure, a limit that no figure can have, or a figure named twice.
    """
    conditions: dict[str, Condition] = {}
    for item in text.split(","):
        figure, equals, limit = (word.strip() for word in item.partition("="))
        if not equals or figure not in _VALUES:
            raise EvaluationError(f"{item.strip()!r}: write FIGURE=LIMIT with a figure out of {', '.join(_VALUES)}")
        if figure in conditions:
            raise EvaluationError(f"{figure} is named twice")
        conditions[figure] = Condition(figure, _limit(figure, limit))
    return Gate(tuple(conditions.values()))


def _limit(figure: str, text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        raise EvaluationError(f"{figure}={text}: {text!r} is not a number") from None
    highest = float("inf") if figure in _AT_MOST else 1.0
    if not (0 <= limit <= highest and limit < float("inf")):
        raise EvaluationError(f"{figure}={text}: must be {'at least 0' if figure in _AT_MOST else 'from 0 to 1'}")
    return limit


_VALUES: Final[Mapping[str, Callable[[Figures], float | None]]] = {
    "kl": lambda figures: figures.kl.value,
    "agreement": lambda figures: figures.agreement.value,
    "exact_match": lambda figures: figures.exact_match.value if figures.exact_match else None,
    "time": lambda figures: figures.time.value,
}
_AT_MOST: Final = frozenset({"kl", "time"})

DEFAULT_GATE: Final = parse_gate("kl=0.1")
"""What ``--recommend`` asks for when the user gives no gate. KL alone: the others swing with a few tokens."""
