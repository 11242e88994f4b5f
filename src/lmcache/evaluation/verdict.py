"""Whether a run passes the gate, and what to use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from lmcache.evaluation.figures import Figures, Summary
from lmcache.evaluation.gate import Gate
from lmcache.evaluation.variants import ANCHORS


class Verdict(msgspec.Struct, frozen=True):
    """``failures`` are what each variant fails of ``gate``, by its name; empty lists are those that pass.

    ``recommending``: one that passes is enough, and the cheapest is ``recommended``, None when none passes. Else all
    must pass.
    """

    gate: Gate
    failures: dict[str, list[str]]
    recommending: bool
    recommended: Figures | None

    @property
    def passed(self) -> bool:
        if self.recommending:
            return self.recommended is not None
        return not any(self.failures.values())

    def lines(self) -> Iterator[str]:
        """In words: each failed condition, or what is recommended."""
        if not self.recommending or not self.passed:
            for name, failures in self.failures.items():
                yield from (f"below the gate: {name}: {failure}" for failure in failures)
        if not self.recommending:
            yield f"the gate ({self.gate}) is {'passed' if self.passed else 'not passed'}"
        elif self.recommended is None:
            yield f"no policy and budget passes the gate ({self.gate}): use full prefill"
        else:
            best = self.recommended
            yield (
                f"recommended: policy {best.variant.policy}, corrector {best.variant.corrector}, ratio "
                f"{best.variant.ratio:.4g}: the cheapest that passes the gate ({self.gate}), at a charged budget of "
                f"{best.charged_budget:.1%}"
            )


def judge(summary: Summary, gate: Gate, *, recommending: bool) -> Verdict:
    """Hold every variant to ``gate``, the anchors aside: they are what the others are seen against."""
    candidates = [figures for figures in summary.figures if figures.variant.policy not in ANCHORS]
    return Verdict(
        gate=gate,
        failures={str(figures.variant): gate.failures(figures) for figures in candidates},
        recommending=recommending,
        recommended=_cheapest(candidates, gate) if recommending else None,
    )


def _cheapest(candidates: Sequence[Figures], gate: Gate) -> Figures | None:
    passing = [figures for figures in candidates if not gate.failures(figures)]
    return min(passing, key=lambda figures: (figures.charged_budget, figures.kl.value), default=None)
