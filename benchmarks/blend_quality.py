"""The quality figures of docs/cacheblend.md: `lmcache evaluate` in many processes, their rows as one report a context.

python benchmarks/blend_quality.py --model DIR --out DIR [--device cuda --gpus 2] [--minutes 7]

Every process takes tasks of a seed of its own, so tasks that time did not allow are missing for all policies alike. Two
H100 take six minutes, two CPU cores a night. Run again with the same --out, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import torch

from lmcache.bench.machine import describe_machine
from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.evaluate import ANSWER_TOKENS
from lmcache.evaluation.figures import summarise
from lmcache.evaluation.plot import plot
from lmcache.evaluation.report import Report
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.rows import Settings
from lmcache.evaluation.runs import make_prompts, run
from lmcache.evaluation.settings import settings_of
from lmcache.evaluation.spelled import make_all
from lmcache.evaluation.table import rich_table
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.variants import Variant
from lmcache.integration.transformers.loading import load_model

# Policy, corrector, charged budgets.
IN_EVERY_CONTEXT = [
    ("none", "none", (0.0,)),
    ("random", "none", (0.15,)),
    ("kv_deviation", "none", (0.15,)),
    ("query_attention", "none", (0.05, 0.1, 0.15)),
    ("sampled_attention", "kriging", (0.05, 0.1, 0.15)),
]
BEHIND_THE_SYSTEM_PROMPT = [
    ("full", "none", (1.0,)),
    ("sink", "none", (0.15,)),
    ("query_attention", "none", (0.3,)),
    ("query_attention", "key_shift", (0.1,)),
    ("sampled_attention", "none", (0.1,)),
    ("sampled_attention", "kriging(alike=0)", (0.1,)),
    ("sampled_attention", "kriging", (0.3,)),
]
POINTS = {
    "system": IN_EVERY_CONTEXT + BEHIND_THE_SYSTEM_PROMPT,
    "alone": IN_EVERY_CONTEXT,
    "prompt": IN_EVERY_CONTEXT,
}
# Processes a context, and tasks a process.
PROCESSES = {"system": (12, 9), "alone": (9, 12), "prompt": (9, 12)}


def work(arguments: argparse.Namespace, context: str, seed: int) -> None:
    """One process: the tasks of one seed in one context."""
    torch.set_num_threads(1)
    points = POINTS[context]
    policies = make_all("policies", ",".join(dict.fromkeys(policy for policy, _, _ in points)), make_policy)
    correctors = make_all("correctors", ",".join(dict.fromkeys(name for _, name, _ in points)), make_corrector)
    model, tokenizer = load_model(arguments.model, "float32", arguments.device)
    subject = BlendedModel(model, tokenizer, policies, correctors, answer_tokens=ANSWER_TOKENS)
    variants = [
        Variant(policy, corrector, budget, policies[policy].ratio_for(budget, subject.num_layers))
        for policy, corrector, budgets in points
        for budget in budgets
    ]
    settings = settings_of(
        arguments.model.name,
        subject.identity,
        dtype="float32",
        device=arguments.device,
        context=context,
        answer_tokens=ANSWER_TOKENS,
    )
    prompts = make_prompts(subject, generate_tasks(PROCESSES[context][1], seed), context)
    with RowFile(arguments.out / f"{context}-{seed}", settings) as rows:
        for _ in run(subject, prompts, variants, rows):
            pass


def start_all(arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    running = []
    for context, (processes, _) in PROCESSES.items():
        for seed in range(1, processes + 1):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(len(running) % arguments.gpus)}
            command = [sys.executable, *sys.argv, "--worker", context, str(seed)]
            with (arguments.out / f"{context}-{seed}.log").open("w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(1)
    for process in running:
        process.terminate()
        process.wait()


def merged(out: Path, context: str) -> Report:
    """One report of the tasks that were run with every policy, whatever process ran them."""
    files = sorted(file for folder in out.glob(f"{context}-*") for file in folder.glob("rows-*.jsonl"))
    settings = msgspec.json.decode(files[0].read_bytes().splitlines()[0], type=Settings)
    with RowFile(out / f"merged-{context}", settings, fresh=True) as rows:
        for file in files:
            with RowFile(file.parent, settings) as part:
                for row in (*part.full.values(), *part.blends.values()):
                    rows.append(row)
        variants = list(dict.fromkeys(variant for _, variant in rows.blends))
        tasks = [task for task in rows.full if all((task, variant) in rows.blends for variant in variants)]
        return Report(
            machine=describe_machine(),
            settings=settings,
            tasks=f"generated from seeds 1 … {len(files)}",
            seed=0,
            summary=summarise(rows, tasks, variants, seed=0),
            not_run=[],
            full_prefills=[rows.full[task] for task in tasks],
            rows=[rows.blends[task, variant] for task in tasks for variant in variants],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--worker", nargs=2, metavar=("CONTEXT", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        context, seed = arguments.worker
        work(arguments, context, int(seed))
        return
    start_all(arguments)
    from rich.console import Console

    for context in POINTS:
        report = merged(arguments.out, context)
        console = Console(width=200, record=True)
        console.print(rich_table(report))
        (arguments.out / f"quality-{context}.txt").write_text(console.export_text())
        (arguments.out / f"quality-{context}.json").write_bytes(report.to_json(None))
        plot(report, arguments.out / f"quality-{context}.png")


if __name__ == "__main__":
    main()
