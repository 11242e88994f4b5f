"""Rows as a table."""

from __future__ import annotations

from rich.table import Table

from lmcache.bench.report import Report
from lmcache.bench.rows import Row

HEADERS = ("figure", "on", "measured", "raw", "of raw speed", "target", "met")
_MET = {True: "yes", False: "no", None: ""}
_STYLE = {True: "green", False: "bold red", None: ""}


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """``row`` in words, in the order of :data:`HEADERS`."""
    case = row.case if row.entries is None else f"{row.case}, {row.entries:,} chunks"
    raw = "" if row.raw is None else f"{number(row.raw)} ({row.baseline})"
    share = ""
    if row.share is not None:
        share = f"{row.share.median:.0%} ({row.share.low:.0%} – {row.share.high:.0%})"
    return row.figure, case, f"{number(row.value)} {row.unit}", raw, share, row.target, _MET[row.met]


def rich_table(report: Report) -> Table:
    """For the terminal; a section a subject."""
    table = Table(title=report.machine, caption=f"medians (and quartiles of shares); {report.seconds:.0f} s")
    for header in HEADERS:
        table.add_column(header, justify="right" if header == "measured" else "left")
    for row, following in zip(report.rows, [*report.rows[1:], None], strict=True):
        *words, met = cells(row)
        ends = following is None or following.subject != row.subject
        table.add_row(*words, f"[{_STYLE[row.met]}]{met}[/]" if met else "", end_section=ends)
    return table
