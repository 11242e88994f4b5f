"""The quality figures of docs/cacheblend.md: runs of `lmcache evaluate` side by side, and their rows as one report.

python benchmarks/blend_quality.py --model DIR --out DIR [--device cuda] [--tasks 100] [--minutes 7]

On one H100 about six minutes; on two CPU cores a day. Writes a table, a plot and a JSON file for each context in which
the passages were cached. A shard that runs out of time leaves out its last tasks, and then all shards do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import msgspec

from lmcache.bench.machine import describe_machine
from lmcache.evaluation.figures import summarise
from lmcache.evaluation.plot import plot
from lmcache.evaluation.report import Report
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.rows import Settings
from lmcache.evaluation.table import rich_table

# Context, policies, correctors, budgets.
SHARDS = [
    ("system", "none,full,random,sink", "none", "0.05,0.15"),
    ("system", "kv_deviation,hybrid", "none", "0.1,0.15,0.3"),
    ("system", "query_attention", "none", "0.02,0.05,0.1,0.15,0.3"),
    ("system", "sampled_attention", "kriging", "0.02,0.05,0.1,0.15,0.3"),
    ("system", "query_attention(layers=late)", "none,key_shift,kriging", "0.1"),
    ("system", "sampled_attention", "none,key_shift,local_key_shift,kriging(alike=0)", "0.1"),
    ("alone", "none,random,kv_deviation", "none", "0.15"),
    ("alone", "query_attention", "none", "0.05,0.1,0.15"),
    ("alone", "sampled_attention", "kriging", "0.05,0.1,0.15"),
    ("prompt", "none,random,kv_deviation", "none", "0.15"),
    ("prompt", "query_attention", "none", "0.05,0.1,0.15"),
    ("prompt", "sampled_attention", "kriging", "0.05,0.1,0.15"),
]


def run_shards(arguments: argparse.Namespace) -> None:
    """All at the same time, each with an output folder of its own."""
    deadline = time.monotonic() + 60 * arguments.minutes
    running = []
    for number, (context, policies, correctors, budgets) in enumerate(SHARDS):
        folder = arguments.out / f"shard-{number}-{context}"
        folder.mkdir(parents=True, exist_ok=True)
        # Named by hand: a child started in mid-run would otherwise see another PATH than ours.
        command = [sys.executable, "-c", "from lmcache.cli.main import app; app()", "evaluate", "--threads", "1"]
        command += ["--model", str(arguments.model), "--device", arguments.device, "--tasks", str(arguments.tasks)]
        command += ["--context", context, "--policies", policies, "--correctors", correctors, "--budgets", budgets]
        command += ["--out", str(folder)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(number % arguments.gpus)}
        with (folder / "log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(1)
    for process in running:
        process.terminate()
        process.wait()


def merge(out: Path, context: str) -> Report:
    """One report of the rows of all shards of a context, over the tasks that every shard has run."""
    files = sorted(file for folder in out.glob(f"shard-*-{context}") for file in folder.glob("rows-*.jsonl"))
    settings = msgspec.json.decode(files[0].read_bytes().splitlines()[0], type=Settings)
    with RowFile(out / f"merged-{context}", settings, fresh=True) as merged:
        tasks: list[str] = []
        variants = []
        for file in files:
            with RowFile(file.parent, settings) as shard:
                done = [row.task for row in shard.full.values()]
                mine = list(dict.fromkeys(variant for _, variant in shard.blends))
                whole = [task for task in done if all((task, variant) in shard.blends for variant in mine)]
                tasks = whole if not variants else [task for task in tasks if task in set(whole)]
                variants += [variant for variant in mine if variant not in variants]
                for row in (*shard.full.values(), *shard.blends.values()):
                    merged.append(row)
        return Report(
            machine=describe_machine(),
            settings=settings,
            tasks="generated from seed 0",
            seed=0,
            summary=summarise(merged, tasks, variants, seed=0),
            not_run=[],
            full_prefills=[merged.full[task] for task in tasks],
            rows=[merged.blends[task, variant] for task in tasks for variant in variants],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=7.0)
    arguments = parser.parse_args()
    run_shards(arguments)
    from rich.console import Console

    for context, _ in groupby(shard[0] for shard in SHARDS):
        report = merge(arguments.out, context)
        console = Console(width=200, record=True)
        console.print(rich_table(report))
        (arguments.out / f"quality-{context}.txt").write_text(console.export_text())
        (arguments.out / f"quality-{context}.json").write_bytes(report.to_json(None))
        plot(report, arguments.out / f"quality-{context}.png")


if __name__ == "__main__":
    main()
