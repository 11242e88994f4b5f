"""The figures as a table for the terminal."""

from __future__ import annotations

from itertools import pairwise

from rich.table import Table

from lmcache.evaluation.bootstrap import Interval
from lmcache.evaluation.figures import Figures, Summary
from lmcache.evaluation.report import Report
from lmcache.evaluation.variants import ANCHORS, RAW, Variant


def rich_table(report: Report) -> Table:
    """A row a variant, a section a policy. The last column compares with the first policy at the same budget."""
    summary = report.summary
    against = next((f.variant for f in summary.figures if f.variant.policy not in ANCHORS), None)
    packs = any(figures.variant.codec != RAW for figures in summary.figures)
    if packs:
        against = None
    table = Table(
        title=f"{report.settings.model}, {report.settings.dtype}, passages cached {_CACHED[report.settings.context]}",
        caption=(
            f"{summary.num_tasks} tasks ({report.tasks}), of which full prefill answers {summary.answered}; means and "
            f"paired 95 % bootstrap intervals; time of the prefill, over full prefill\n{report.machine}"
        ),
    )
    headers = [
        "policy",
        *(["KV, ratio", "KV, error"] if packs else []),
        "charged budget",
        "KL, nats",
        "tokens agree",
        "exact match",
        "time",
    ]
    for header in headers + ([f"KL / KL of {against.label}"] if against else []):
        table.add_column(header, justify="left" if header == "policy" else "right")
    for figures, following in pairwise([*summary.figures, None]):
        assert figures is not None
        cells = _cells(figures, packs) + ([_relative(summary, figures.variant, against)] if against else [])
        ends = following is None or following.variant.label != figures.variant.label
        table.add_row(*cells, end_section=ends)
    return table


_CACHED = {
    "alone": "alone",
    "system": "behind the system prompt",
    "prompt": "in an earlier prompt",
    "prefix": "as a prefix",
}


def _cells(figures: Figures, packs: bool) -> list[str]:
    fallbacks = f" ({figures.fallbacks} full prefills)" if figures.fallbacks else ""
    return [
        figures.variant.label + fallbacks,
        *([f"{figures.packed_ratio:.2f}", f"{figures.packed_error:.2%}"] if packs else []),
        f"{figures.charged_budget:.1%}",
        _cell(figures.kl, ".3f"),
        _cell(figures.agreement, ".0%"),
        _cell(figures.exact_match, ".0%"),
        _cell(figures.time, ".2f"),
    ]


def _relative(summary: Summary, variant: Variant, against: Variant) -> str:
    if variant.policy in ANCHORS or variant.label == against.label:
        return ""
    to = next(
        (f.variant for f in summary.figures if (f.variant.label, f.variant.budget) == (against.label, variant.budget)),
        None,
    )
    return "" if to is None else _cell(summary.relative_to(variant, to), ".2f")


def _cell(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "–"
    return f"{interval.value:{form}} ({interval.low:{form}} – {interval.high:{form}})"
