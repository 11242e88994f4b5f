"""Quality against charged budget, as a picture (matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache.bench.plot import new_figure, tidy
from lmcache.evaluation.bootstrap import Interval
from lmcache.evaluation.figures import Figures
from lmcache.evaluation.report import Report
from lmcache.evaluation.variants import ANCHORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS: Sequence[tuple[str, Callable[[Figures], Interval | None]]] = (
    ("KL to full prefill at the first answer token, nats", lambda figures: figures.kl),
    ("greedy tokens that agree, %", lambda figures: figures.agreement),
    ("answered, of what full prefill answers, %", lambda figures: figures.exact_match),
)


def plot(report: Report, path: Path) -> None:
    """Write a PNG: a panel a figure, a line a policy with its intervals; what reuses everything is a dotted line.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: ``path`` cannot be written.
    """
    figure = new_figure(16, 5.4)
    everything = report.summary.figures
    for axes, (title, of) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        percent = 100 if title.endswith("%") else 1
        for label in dict.fromkeys(f.variant.label for f in everything if f.variant.policy not in ANCHORS):
            _draw(axes, [f for f in everything if f.variant.label == label], of, percent)
        for anchor in (f for f in everything if f.variant.policy in ANCHORS):
            interval = of(anchor)
            if interval is not None:
                style = ":" if anchor.variant.policy == ANCHORS[0] else "--"
                axes.axhline(
                    interval.value * percent, color="#555555", linestyle=style, linewidth=1, label=str(anchor.variant)
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("charged budget, % of the reused tokens' QKV")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        tidy(axes, "both")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    settings = report.settings
    figure.suptitle(f"{settings.model}, {report.summary.num_tasks} tasks, passages cached: {settings.context}")
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, line: Sequence[Figures], of: Callable[[Figures], Interval | None], percent: int) -> None:
    points = [(figures.charged_budget * 100, interval) for figures in line if (interval := of(figures)) is not None]
    if not points:
        return
    at = [budget for budget, _ in points]
    values = [interval.value * percent for _, interval in points]
    below = [(interval.value - interval.low) * percent for _, interval in points]
    above = [(interval.high - interval.value) * percent for _, interval in points]
    axes.errorbar(at, values, yerr=[below, above], marker="o", markersize=4, capsize=2, label=line[0].variant.label)
