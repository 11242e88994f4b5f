"""The figures of each variant over all tasks, from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from statistics import fmean

import msgspec

from lmcache.evaluation.bootstrap import Interval, PairedBootstrap
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.rows import BlendRow
from lmcache.evaluation.variants import Variant


class Figures(msgspec.Struct, frozen=True):
    """Means over all tasks.

    Attributes:
        charged_budget: as measured.
        kl: nats, at the first answer token.
        agreement: of the greedy tokens.
        exact_match: of the tasks that full prefill answers, the share that the blend answers too; None: there are none.
        time: seconds of the blends over seconds of the full prefills.
        fallbacks: tasks in which nothing was reused.
        packed_ratio: raw bytes of the reused KV over packed ones.
        packed_error: root mean square of what the codec changed, over that of the numbers.
    """

    variant: Variant
    charged_budget: float
    kl: Interval
    agreement: Interval
    exact_match: Interval | None
    time: Interval
    fallbacks: int
    packed_ratio: float = 1.0
    packed_error: float = 0.0


class Relative(msgspec.Struct, frozen=True):
    """Mean KL of ``variant`` over that of ``to``, on the same tasks."""

    variant: Variant
    to: Variant
    kl: Interval


class Summary(msgspec.Struct, frozen=True):
    """``answered`` of ``num_tasks`` tasks did full prefill answer. ``relative`` has every pair of variants."""

    num_tasks: int
    answered: int
    figures: list[Figures]
    relative: list[Relative]

    def relative_to(self, variant: Variant, to: Variant) -> Interval | None:
        """KL of ``variant`` over KL of ``to``; None when there is no such pair, or the other's is 0."""
        return next((pair.kl for pair in self.relative if (pair.variant, pair.to) == (variant, to)), None)


def summarise(rows: RowFile, tasks: Sequence[str], variants: Sequence[Variant], seed: int) -> Summary:
    """Figures of ``variants`` over ``tasks`` (digests), which all have their rows."""
    bootstrap = PairedBootstrap(len(tasks), seed)
    full = [rows.full[task] for task in tasks]
    answered = [float(row.answered is True) for row in full]

    def figures(variant: Variant, blends: Sequence[BlendRow]) -> Figures:
        both = [float(row.answered is True) * by_full for row, by_full in zip(blends, answered, strict=True)]
        time = bootstrap.ratio([row.seconds for row in blends], [row.seconds for row in full])
        assert time is not None
        return Figures(
            variant=variant,
            charged_budget=sum(row.charged_budget for row in blends) / len(blends),
            kl=bootstrap.mean([row.kl for row in blends]),
            agreement=bootstrap.mean([row.agreement for row in blends]),
            exact_match=bootstrap.ratio(both, answered),
            time=time,
            fallbacks=sum(row.fallback is not None for row in blends),
            packed_ratio=fmean(row.packed_ratio for row in blends),
            packed_error=fmean(row.packed_error for row in blends),
        )

    blends = {variant: [rows.blends[task, variant] for task in tasks] for variant in variants}
    relative = []
    for variant, to in permutations(variants, 2):
        ratio = bootstrap.ratio([row.kl for row in blends[variant]], [row.kl for row in blends[to]])
        if ratio is not None:
            relative.append(Relative(variant, to, ratio))
    return Summary(
        num_tasks=len(tasks),
        answered=int(sum(answered)),
        figures=[figures(variant, some) for variant, some in blends.items()],
        relative=relative,
    )
