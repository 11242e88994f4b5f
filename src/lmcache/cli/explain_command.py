"""``lmcache explain``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lmcache.cli.refusing import refuse
from lmcache.client.explain import STYLES, as_html, prompt_tokens, summary, with_text
from lmcache.client.reply import Reuse
from lmcache.client.server import Server, ServerError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a document must not steer the terminal


def explain(
    request: Annotated[Path, typer.Argument(help="JSON body of the request (chat completion or completion).")],
    server: Annotated[str, typer.Option(help="Root of the server; it turns tokens into text.")],
    reply: Annotated[
        Path | None, typer.Option(help="JSON of the reply; without it the request is sent to the server now.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
) -> None:
    """Print a prompt in three colours: what was reused, what was recomputed, and what was computed."""
    console = Console()
    try:
        body = _read(request)
        host = Server(server, api_key)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        answer = host.post(path, _asking(body)) if reply is None else _read(reply)
        reuse = Reuse.of(answer)
        parts = with_text(reuse, prompt_tokens(body, answer, host), body.get("model"), host)
        if html is not None:
            html.write_text(as_html(reuse, parts), encoding="utf-8")
    except (ValueError, OSError, ServerError) as error:
        refuse(error)
    for run, text in parts:
        # Without colours, what was not reused is marked.
        text = _CONTROL.sub("\ufffd", text)
        coloured = console.color_system and not console.no_color
        marked = text if coloured or run.fate.value == "reused" else f"[{run.fate.value}: {text}]"
        console.print(Text(marked, style=STYLES[run.fate]), end="", soft_wrap=True)
    console.print()
    console.print(summary(reuse), markup=False, highlight=False, soft_wrap=True)


def _asking(body: dict[str, Any]) -> dict[str, Any]:
    """The request so that its reply tells: not streamed, and with the prompt's tokens as they were computed."""
    kept = {key: value for key, value in body.items() if key != "stream_options"}  # refused without streaming
    return {**kept, "stream": False, "return_token_ids": True}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found
