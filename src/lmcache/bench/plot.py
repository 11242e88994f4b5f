"""Rows as pictures (matplotlib, which ``lmcache-blend[bench]`` installs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache.bench.rows import Row
from lmcache.bench.table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "plots need matplotlib: pip install 'lmcache-blend[bench]'"
_COLORS = {"memory": "#3b6ea8", "pages": "#c8742c", "disk": "#5b8c5a"}
_WIDEST = 150
"""Shares above this are cut off: they are a disturbed raw copy, not a fast cache."""
_OURS, _RAW, _TARGET = "#3b6ea8", "#222222", "#b03030"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write a PNG for each picture that ``rows`` give; returns which.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: ``directory`` cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    pictures: dict[str, tuple[Callable[[Sequence[Row]], Figure], list[Row]]] = {
        "bench-throughput.png": (_throughput, [row for row in rows if row.min_share is not None]),
        "bench-keys.png": (_keys, [row for row in rows if row.subject == "keys"]),
        "bench-growth.png": (_growth, [row for row in rows if row.entries is not None]),
    }
    for name, (draw, shown) in pictures.items():
        if shown:
            path = directory / name
            draw(shown).savefig(path, dpi=120)
            written.append(path)
    return written


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that can be saved; sizes in inches."""
    # Without pyplot: it would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _throughput(rows: Sequence[Row]) -> Figure:
    figure = new_figure(10, 1.2 + 0.36 * len(rows))
    axes = figure.subplots()
    for at, row in enumerate(rows):
        share = row.share
        assert share is not None
        assert row.min_share is not None
        axes.barh(at, share.median * 100, color=_COLORS[row.subject], height=0.62)
        axes.plot([share.low * 100, share.high * 100], [at, at], color=_RAW, linewidth=1.2)
        axes.plot([row.min_share * 100] * 2, [at - 0.4, at + 0.4], color=_TARGET, linewidth=2)
        words = f"{share.median:.0%} · {number(row.value)} GB/s"
        axes.text(1.01, at, words, va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [f"{row.figure}: {row.case}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, _WIDEST)
    axes.set_xlabel("share of the raw speed in the same run, % (red: target; thin line: quartiles)")
    axes.set_title("Moving KV, against a raw copy of the same bytes")
    tidy(axes, "x")
    return figure


def _keys(rows: Sequence[Row]) -> Figure:
    figure = new_figure(10, 4.2)
    cases = list(dict.fromkeys(row.case for row in rows))
    kinds = list(dict.fromkeys(row.figure for row in rows))
    axes = figure.subplots()
    for index, kind in enumerate(kinds):
        some = [row for row in rows if row.figure == kind]
        at = [cases.index(row.case) + (index - 0.5) * 0.36 for row in some]
        color = (_OURS, "#8fb2d9")[index]
        bars = axes.bar(at, [row.value for row in some], width=0.32, color=color, label=kind)
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, [number(row.value) for row in some], fontsize=8, padding=2, bbox=on_white)
        axes.hlines(
            [row.raw or 0.0 for row in some],
            [x - 0.16 for x in at],
            [x + 0.16 for x in at],
            color=_RAW,
            label="blake3 alone" if index == 0 else "",
        )
    axes.axhline(rows[0].max_value or 0.0, color=_TARGET, linewidth=1.5, label="target")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("µs per 1,000 tokens")
    axes.set_title("Naming a prompt")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    tidy(axes, "y")
    return figure


def _growth(rows: Sequence[Row]) -> Figure:
    figure = new_figure(11, 7.5)
    names = list(dict.fromkeys(row.figure for row in rows if not row.figure.startswith("…")))
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        panel = [row for row in rows if row.figure == name]
        for tier, marker in (("memory tier", "o"), ("disk tier", "s")):
            line = [row for row in panel if row.case == tier]
            if line:
                axes.plot([row.entries for row in line], [row.value for row in line], marker=marker, label=tier)
        limits = [row.max_value for row in panel if row.max_value is not None]
        if limits:
            axes.axhline(limits[0], color=_TARGET, linewidth=1.5, label="target at 100,000 chunks")
        axes.set_xscale("log")
        decades = max(row.value for row in panel) / max(min(row.value for row in panel), 1e-12)
        if decades > 30:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.2 * max(*limits, *(row.value for row in panel)))
        axes.set_xlabel("chunks in the index")
        axes.set_ylabel(f"{name}, {panel[0].unit}")
        axes.legend(fontsize=8, frameon=False)
        tidy(axes, "both")
    figure.suptitle("How the index grows")
    return figure


def tidy(axes: Axes, grid: str) -> None:
    """Light grid lines along ``grid`` ("x", "y" or "both"), no frame."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
