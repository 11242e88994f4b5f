"""``lmcache warm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from lmcache.cli.refusing import refuse
from lmcache.client.server import Server
from lmcache.client.warm import PLACE, find_documents
from lmcache.client.warm import warm as read_in


def warm(
    documents: Annotated[list[Path], typer.Argument(help="Text files, or directories of .txt and .md files.")],
    server: Annotated[str, typer.Option(help="Root of the OpenAI-compatible server.")],
    model: Annotated[str, typer.Option(help="The model's name, as in requests.")],
    system: Annotated[Path, typer.Option(help="File with the system prompt that questions will have.")],
    template: Annotated[str, typer.Option(help="How a document stands in the user's message.")] = PLACE,
    parallel: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    state: Annotated[Path | None, typer.Option(help="Remember here what is done, and skip it next time.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one document may take.")] = 600.0,
) -> None:
    """Read documents into the cache of a running server, so that the first question about them is already fast."""
    console = Console(stderr=True)
    try:
        system_text = system.read_text(encoding="utf-8")
        if not (found := find_documents(documents)):
            refuse("no documents: the directories hold no .txt or .md file")
        with Progress(console=console) as progress:
            task = progress.add_task("documents", total=len(found))
            report = read_in(
                Server(server, api_key, timeout),
                model,
                system_text,
                found,
                template=template,
                parallel=parallel,
                state=state,
                on_progress=lambda path: progress.advance(task),
            )
    except (ValueError, OSError) as error:
        refuse(error)
    for path, reason in report.failed.items():
        console.print(f"{path}: {reason}", style="red", markup=False, highlight=False)
    print(f"{len(report.done)} read in, {len(report.skipped)} done before, {len(report.failed)} failed")
    if report.failed:
        console.print("Run the same command again when the cause is gone; with --state it sends only what is missing.")
        raise typer.Exit(1)
