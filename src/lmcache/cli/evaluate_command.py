"""``lmcache evaluate``: how good the answers of a model are when it blends, policy by policy, budget by budget."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache.cli.refusing import refuse

if TYPE_CHECKING:
    from lmcache.evaluation.report import Report
    from lmcache.evaluation.verdict import Verdict

_MISSING = "evaluating needs transformers: pip install 'lmcache-blend[transformers]'"


def evaluate(
    model: Annotated[Path, typer.Option("--model", help="The folder of a Hugging Face model.")],
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="How many tasks to generate, kinds in turn.")] = 100,
    tasks_file: Annotated[
        Path | None,
        typer.Option(
            "--tasks-file", help="Your own tasks instead: JSON lines with passages, question, and maybe system, answer."
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option("--policies", help="Comma-separated, options in parentheses: none,sink(k=4) (default: all)."),
    ] = None,
    correctors: Annotated[
        str | None, typer.Option("--correctors", help='Likewise (default: "none" and the one that is used by default).')
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Charged budgets: shares of the reused tokens' QKV to compute afresh.")
    ] = "0.02,0.05,0.1,0.15,0.3",
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            help="Comma-separated (raw,zstd,fp8,delta): reused KV is packed and unpacked by each before it is used.",
        ),
    ] = None,
    context: Annotated[
        str,
        typer.Option(
            "--context",
            help="Where passages stood when cached: alone, system (behind it), prompt (an earlier one), prefix (where "
            "they stand now: what is measured is prefix reuse).",
        ),
    ] = "system",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="Where the model runs, as torch names it.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", help="For report.json, quality.png and the rows.")] = Path("evaluation"),
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with the rows in --out, or begin again.")
    ] = True,
    gate: Annotated[
        str | None,
        typer.Option(
            "--gate",
            help="As kl=0.1,agreement=0.75 (also exact_match, time): exit with 1 unless every policy and budget meets "
            "it; with --recommend, unless one does.",
        ),
    ] = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Name the cheapest policy and budget that meets the gate.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the generated tasks and of the intervals.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Compare blends with full prefill on tasks of several passages, for each policy, corrector and budget.

    Told are the KL divergence at the first answer token, how many of the first 32 greedy tokens agree, how many of the
    questions that full prefill answers are answered, and the time of the prefill. A killed run goes on where it
    stopped. Exit code 2: it could not be run; 1: below the gate, or nothing to recommend.
    """
    if find_spec("transformers") is None:
        refuse(_MISSING)
    from lmcache.evaluation.errors import EvaluationError
    from lmcache.evaluation.evaluate import evaluate as run
    from lmcache.evaluation.gate import DEFAULT_GATE, parse_gate
    from lmcache.evaluation.plan import Plan
    from lmcache.evaluation.progress import follow
    from lmcache.evaluation.verdict import judge

    try:
        asked = None if gate is None else parse_gate(gate)
        plan = Plan.parse(
            model=model,
            num_tasks=tasks,
            tasks_file=tasks_file,
            policies=policies,
            correctors=correctors,
            budgets=budgets,
            context=context,
            dtype=dtype,
            device=device,
            seed=seed,
            threads=threads,
            codecs=codec,
        )
        report = run(plan, out, fresh=not resume, follow=follow)
    except (EvaluationError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from the rows in {out}", err=True)
        raise typer.Exit(130) from None
    verdict = judge(report.summary, asked or DEFAULT_GATE, recommending=recommend) if asked or recommend else None
    _show(report, verdict, out)
    if verdict is not None and not verdict.passed:
        raise typer.Exit(1)


def _show(report: Report, verdict: Verdict | None, out: Path) -> None:
    from rich.console import Console

    from lmcache.bench.plot import MISSING, can_plot
    from lmcache.evaluation.plot import plot
    from lmcache.evaluation.table import rich_table

    # In a pipe there is no width to fit into, and folded lines would be hard to search.
    Console(width=None if sys.stdout.isatty() else 220).print(rich_table(report))
    for skipped in report.not_run:
        typer.echo(f"not run: {skipped}", err=True)
    (out / "report.json").write_bytes(report.to_json(verdict))
    typer.echo(f"wrote {out / 'report.json'}", err=True)
    if can_plot():
        plot(report, out / "quality.png")
        typer.echo(f"drew {out / 'quality.png'}", err=True)
    else:
        typer.echo(MISSING, err=True)
    if verdict is not None:
        for line in verdict.lines():
            typer.echo(line)
