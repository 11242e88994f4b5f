"""What a demo prints while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from demo.conversation import Answer, Ask, hold
from demo.server import EngineServer

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def started(title: str, server: EngineServer) -> Iterator[None]:
    """The server runs and is ready within the block."""
    with server:
        start = time.monotonic()
        if not console.is_terminal:
            console.print(f"{title} …")
        with console.status(f"{title} …") as status:

            def show(line: str) -> None:
                status.update(f"{title}: {time.monotonic() - start:.0f} s  [dim]{escape(line[-90:])}")

            seconds = server.wait_until_ready(show)
        console.print(f"[bold]{title}:[/bold] ready after {seconds:.0f} s")
        yield


def hold_aloud(title: str, ask: Ask, earlier_texts: Sequence[str] = ()) -> list[Answer]:
    """:func:`demo.conversation.hold`, each answer printed as it comes."""
    console.print(f"\n[bold]{title}")
    answers = []
    for answer in hold(ask, earlier_texts):
        origin = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in answer.tokens_by_tier.items() if tokens)
        figures = f"{answer.seconds_to_first_token:.2f} s, {answer.prompt_tokens:,} tokens"
        console.print(f"  [cyan]{answer.question}[/cyan]  [dim]{figures}{', ' + origin if origin else ''}")
        console.print(f"    {escape(answer.text.strip())}")
        answers.append(answer)
    return answers
