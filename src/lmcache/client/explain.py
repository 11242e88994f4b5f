"""A prompt with what became of each token: reused, recomputed or computed."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from lmcache.client.reply import ReplyError, Reuse
from lmcache.client.server import Server


class Fate(str, Enum):
    """``value`` is how it is named to a reader."""

    REUSED = "reused"
    RECOMPUTED = "recomputed"
    COMPUTED = "computed"


class Run(NamedTuple):
    """Tokens ``[start, end)`` of a prompt with one fate; ``origin`` says where reused ones come from."""

    start: int
    end: int
    fate: Fate
    origin: str


class TextRun(NamedTuple):
    run: Run
    text: str


# What of a request decides its prompt, and /tokenize takes as well.
_RENDERED = (
    "model", "messages", "prompt", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt",
    "continue_final_message", "add_special_tokens", "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip
STYLES = {Fate.REUSED: "green", Fate.RECOMPUTED: "yellow", Fate.COMPUTED: "red"}
_COLOURS = {Fate.REUSED: "#c8ecc8", Fate.RECOMPUTED: "#f6e3a1", Fate.COMPUTED: "#f5c4c0"}


def runs(reuse: Reuse) -> list[Run]:
    """The whole prompt in order, cut wherever fate or origin changes."""
    fates: list[tuple[Fate, str]] = [(Fate.COMPUTED, "")] * reuse.prompt_tokens
    blend = reuse.blend
    # A blend that was begun and given up has no segments, and reused nothing behind its prefix.
    begun = blend is not None and bool(blend.segments or blend.policy)
    prefix = blend.prefix_tokens if blend is not None and begun else reuse.reused_tokens
    fates[:prefix] = [(Fate.REUSED, "exact prefix")] * min(prefix, reuse.prompt_tokens)
    if blend is not None:
        for segment in blend.segments:
            tiers = ", ".join(segment.tokens_by_tier)
            origin = f"passage from position {segment.old_start}, {tiers}"
            fates[segment.start : segment.end] = [(Fate.REUSED, origin)] * (segment.end - segment.start)
        for start, end in blend.recomputed:
            fates[start:end] = [(Fate.RECOMPUTED, origin) for _, origin in fates[start:end]]
    if fates:
        fates[-1] = (Fate.COMPUTED, "")  # it gives the first token of the answer
    found: list[Run] = []
    start = 0
    for end in range(1, len(fates) + 1):
        if end == len(fates) or fates[end] != fates[start]:
            found.append(Run(start, end, *fates[start]))
            start = end
    return found


def prompt_tokens(request: Mapping[str, Any], reply: Mapping[str, Any], server: Server) -> list[int]:
    """Token ids of the prompt: from the reply if it was asked with ``return_token_ids``, else from the server.

    Raises:
        ServerError: the server does not tell.
        ReplyError: the request has neither messages nor a prompt.
    """
    for holder in (reply, *(reply.get("choices") or ())[:1]):
        if isinstance(ids := holder.get("prompt_token_ids"), list):
            return ids
    asked = {key: request[key] for key in _RENDERED if key in request}
    if isinstance(ids := asked.get("prompt"), list) and all(isinstance(token, int) for token in ids):
        return ids
    if "messages" not in asked and not isinstance(asked.get("prompt"), str):
        raise ReplyError("the request has neither messages nor one prompt")
    tokens = server.post("/tokenize", asked).get("tokens")
    if not isinstance(tokens, list):
        raise ReplyError("/tokenize of the server answers without tokens: ask with return_token_ids")
    return tokens


def with_text(reuse: Reuse, tokens: list[int], model: str | None, server: Server) -> list[TextRun]:
    """The runs of a prompt with their text, which the server makes of the tokens.

    Raises:
        ReplyError: ``tokens`` are not those of the reply.
    """
    if len(tokens) != reuse.prompt_tokens:
        raise ReplyError(f"the reply is of a prompt of {reuse.prompt_tokens} tokens, the request has {len(tokens)}")
    body = {"model": model} if model else {}
    return [
        TextRun(run, str(server.post("/detokenize", {**body, "tokens": tokens[run.start : run.end]}).get("prompt", "")))
        for run in runs(reuse)
    ]


def summary(reuse: Reuse) -> str:
    """One paragraph: how many tokens had which fate, and what it took."""
    counts = dict.fromkeys(Fate, 0)
    for run in runs(reuse):
        counts[run.fate] += run.end - run.start
    lines = [f"{reuse.prompt_tokens} tokens: " + ", ".join(f"{counts[fate]} {fate.value}" for fate in Fate)]
    blend = reuse.blend
    if blend is not None and blend.segments:
        lines.append(f"policy {blend.policy} + {blend.corrector}, charged budget {blend.charged_budget:.1%}")
        lines.append("milliseconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in blend.milliseconds.items()))
    elif blend is not None and blend.fallback:
        lines.append(f"not blended: {blend.fallback}")
    return "\n".join(lines)


def as_html(reuse: Reuse, parts: list[TextRun]) -> str:
    """A page of its own, without scripts."""
    legend = "".join(f'<span style="background:{_COLOURS[fate]}">{fate.value}</span> ' for fate in Fate)
    return (
        '<!doctype html><meta charset="utf-8"><title>What was reused</title>'
        "<style>body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}"
        "pre{white-space:pre-wrap}span{padding:1px 0}</style>"
        f"<p>{legend}</p><pre>{html.escape(summary(reuse))}</pre><pre>{''.join(_spans(parts))}</pre>\n"
    )


def _spans(parts: list[TextRun]) -> Iterator[str]:
    for run, text in parts:
        title = f"tokens {run.start} … {run.end - 1}, {run.fate.value}" + (f", {run.origin}" if run.origin else "")
        yield f'<span style="background:{_COLOURS[run.fate]}" title="{html.escape(title)}">{html.escape(text)}</span>'
