"""``lmcache bench``: how fast the cache is on this machine, against the least it could cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lmcache.bench.run import SUBJECTS
from lmcache.cli.refusing import refuse

_CHOICES = (*SUBJECTS, "all")


def bench(
    subject: Annotated[str, typer.Argument(metavar=f"[{'|'.join(_CHOICES)}]", help="What to measure.")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
    plot_directory: Annotated[
        Path | None, typer.Option("--plot", help="Also draw them, as PNG files in this directory (needs matplotlib).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Take seconds instead of minutes; rough figures.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="On the disk to measure (default: the current directory).")
    ] = None,
) -> None:
    """Measure the cache on this machine: naming prompts, moving KV through memory, pages and disk, growth, start.

    Where bytes are moved, they are also copied plainly in the same run, and the table shows our share of that speed.
    """
    from lmcache.bench.plot import MISSING, can_plot, plot
    from lmcache.bench.run import measure
    from lmcache.bench.settings import Settings
    from lmcache.bench.table import rich_table

    where = directory or Path.cwd()
    if subject not in _CHOICES:
        refuse(f"{subject!r} is not one of {', '.join(_CHOICES)}")
    if not os.access(where, os.W_OK | os.X_OK) or not where.is_dir():
        refuse(f"--directory {where} is not a directory that can be written")
    if plot_directory is not None and not can_plot():
        refuse(MISSING)
    settings = Settings.quick(where) if quick else Settings.full(where)
    report = measure(
        SUBJECTS if subject == "all" else [subject],
        settings,
        progress=lambda name: typer.echo(f"measuring {name} …", err=True),
    )
    from rich.console import Console

    # In a pipe there is no width to fit into, and folded lines would be hard to search.
    Console(width=None if sys.stdout.isatty() else 220).print(rich_table(report))
    for note in report.notes:
        typer.echo(f"not measured: {note}", err=True)
    if json_file is not None:
        json_file.write_bytes(report.to_json())
    if plot_directory is not None:
        for path in plot(report.rows, plot_directory):
            typer.echo(f"drew {path}", err=True)
    if not report.rows:
        raise typer.Exit(1)
