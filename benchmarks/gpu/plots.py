"""Figures of the GPU benchmarks as pictures, in the look of ``lmcache.bench.plot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.setup import BLEND, LABELS, OFFLOADING, OURS, PLAIN, PREFIX_ONLY
from benchmarks.gpu.ttft import BLENDS, EXACT_RELOAD, RELOAD
from lmcache.bench.plot import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {PLAIN: "#222222", OFFLOADING: "#c8742c", OURS: "#3b6ea8", PREFIX_ONLY: "#8fb2d9", BLEND: "#3b6ea8"}
BLEND_COLORS = ("#3b6ea8", "#8fb2d9", "#5b8c5a", "#a9c6a8")
TARGET = "#b03030"

Found = dict[str, Any]


def plot_ttft(cells: list[Found], path: Path) -> None:
    """Seconds to first token over prompt length: known prompts, and known documents in a new order."""
    figure = new_figure(11, 4.6)
    known, blended = figure.subplots(1, 2, sharey=True)
    _draw(known, cells, PLAIN, "cold", LABELS[PLAIN], COLORS[PLAIN])
    _draw(known, cells, OFFLOADING, RELOAD, f"{LABELS[OFFLOADING]}, {RELOAD}", COLORS[OFFLOADING])
    _draw(known, cells, OURS, RELOAD, f"{LABELS[OURS]}, {RELOAD}", COLORS[OURS])
    _draw(known, cells, OURS, EXACT_RELOAD, f"{LABELS[OURS]}, {EXACT_RELOAD}", COLORS[PREFIX_ONLY])
    known.set_title("A prompt seen before")
    _draw(blended, cells, PLAIN, "cold", LABELS[PLAIN], COLORS[PLAIN])
    for color, kind in zip(BLEND_COLORS, BLENDS, strict=True):
        _draw(blended, cells, OURS, kind, kind, color)
    blended.set_title("Known documents in a new order")
    known.set_ylabel("seconds to first token")
    for axes in (known, blended):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of prompt")
        lengths = sorted({cell["tokens"] for cell in cells})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        _in_seconds(axes, [cell["seconds"] for cell in cells])
        axes.legend(fontsize=8, frameon=False)
        tidy(axes, "both")
    figure.savefig(path, dpi=120)


def _in_seconds(axes: Axes, taken: list[float]) -> None:
    """A logarithmic axis with ticks that can be read."""
    axes.set_yscale("log")
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if min(taken) / 2 <= tick <= 2 * max(taken)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _draw(axes: Axes, cells: list[Found], variant: str, kind: str, label: str, color: str) -> None:
    line = sorted(
        (cell["tokens"], cell["seconds"])
        for cell in cells
        if (cell["variant"], cell["kind"]) == (variant, kind) and cell["sound"]
    )
    if line:
        axes.plot([tokens for tokens, _ in line], [taken for _, taken in line], marker="o", color=color, label=label)


def plot_poisson(cells: list[Found], limit: float, path: Path) -> None:
    """Seconds to first token over the rate of requests."""
    figure = new_figure(11, 4.6)
    for axes, percentile, name in zip(figure.subplots(1, 2), ("p50", "p99"), ("50th", "99th"), strict=True):
        for variant in dict.fromkeys(cell["variant"] for cell in cells):
            line = [(cell["rate"], cell[percentile]) for cell in cells if cell["variant"] == variant and cell["sound"]]
            rates, taken = [rate for rate, _ in line], [seconds for _, seconds in line]
            axes.plot(rates, taken, marker="o", color=COLORS[variant], label=LABELS[variant])
        _in_seconds(axes, [cell[percentile] for cell in cells])
        axes.set_xlabel("requests a second")
        axes.set_title(f"{name} percentile")
        if percentile == "p99":
            axes.axhline(limit, color=TARGET, linewidth=1.5, label=f"{limit:g} s")
        else:
            axes.set_ylabel("seconds to first token")
        axes.legend(fontsize=8, frameon=False)
        tidy(axes, "both")
    figure.savefig(path, dpi=120)
