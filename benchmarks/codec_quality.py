"""What each codec costs in answers: writes the tables of ``docs/codecs.md``.

usage: python -m benchmarks.codec_quality --model FOLDER [--tasks N] [--dtype bfloat16] [--out FOLDER]

``lmcache evaluate --codec``, once with all passages reused as a prefix and once blended. A killed run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmcache.evaluation.evaluate import evaluate
from lmcache.evaluation.figures import Figures
from lmcache.evaluation.plan import Plan
from lmcache.evaluation.report import Report
from lmcache.storage.codecs import CODEC_NAMES, make_codec

PAGE = Path(__file__).parent.parent / "docs" / "codecs.md"
BEGIN, END = "<!-- figures: written by benchmarks/codec_quality.py -->", "<!-- end of figures -->"
HEADERS = ("codec", "exact", "ratio", "error (RMS)", "KL, nats", "tokens agree", "answers kept")
WHAT = {
    "prefix": ("none", "Prefix reuse: all of the prompt but the question was packed and unpacked."),
    "system": ("sampled_attention", "CacheBlend: passages cached behind the system prompt, a charged budget of 15 %."),
}


def run(model: Path, context: str, tasks: int, dtype: str, out: Path) -> Report:
    plan = Plan.parse(
        model=model,
        num_tasks=tasks,
        tasks_file=None,
        policies=WHAT[context][0],
        correctors=None,
        budgets="0.15",
        context=context,
        dtype=dtype,
        device="cpu",
        seed=0,
        threads=1,
        codecs=",".join(CODEC_NAMES),
    )
    return evaluate(plan, out, fresh=False, follow=lambda steps, of: follow(context, steps, of))


def follow(context: str, steps: Iterable[int], of: int) -> None:
    done = 0
    for step in steps:
        done += step
        print(f"{context}: {done} of {of} answers", flush=True)


def markdown(what: str, report: Report) -> Iterator[str]:
    summary, settings = report.summary, report.settings
    yield (
        f"{what} {settings.model} in {settings.dtype}, {summary.num_tasks} tasks ({report.tasks}), of which full "
        f"prefill answers {summary.answered}; in parentheses 95 % intervals. {report.machine}."
    )
    yield ""
    yield from (f"| {' | '.join(line)} |" for line in (HEADERS, ("---",) * len(HEADERS)))
    yield from (f"| {' | '.join(cells(figures))} |" for figures in summary.figures)
    yield ""


def cells(figures: Figures) -> tuple[str, ...]:
    kl, agreement, kept = figures.kl, figures.agreement, figures.exact_match
    return (
        f"`{figures.variant.codec}`",
        "yes" if make_codec(figures.variant.codec).is_exact else "no",
        f"{figures.packed_ratio:.2f}",
        f"{figures.packed_error:.2%}",
        f"{kl.value:.4f} ({kl.low:.4f} – {kl.high:.4f})",
        f"{agreement.value:.0%} ({agreement.low:.0%} – {agreement.high:.0%})",
        "–" if kept is None else f"{kept.value:.0%} ({kept.low:.0%} – {kept.high:.0%})",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(".cache/codec-quality"))
    given = parser.parse_args()
    lines: list[str] = []
    for context, (_, what) in WHAT.items():
        lines += markdown(what, run(given.model, context, given.tasks, given.dtype, given.out))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
