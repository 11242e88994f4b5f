"""A conversation over a long document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SERVED_NAME = "SmolLM2-135M-Instruct"
DOCUMENT = Path(__file__).with_name("document.txt")
INSTRUCTION = "You are the clerk of the harbour office. Answer in one sentence from this handbook."
QUESTIONS = [
    "How long is the north pier?",
    "What is the storm signal?",
    "How many passengers does the ferry carry?",
    "Who is the harbour master?",
]
MAX_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """``tokens_by_tier`` tells how many of the ``reused_tokens`` came from "memory" and from "disk"; of them CacheBlend
    computed ``recomputed_tokens`` all the same. ``milliseconds`` are those that the request waited for the cache, and
    that the engine's loop spent in it."""

    question: str
    text: str
    prompt_tokens: int
    reused_tokens: int
    tokens_by_tier: dict[str, int]
    seconds_to_first_token: float
    recomputed_tokens: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)


Ask = Callable[[str, list[dict[str, str]]], Answer]
"""Sends the messages of a chat, the question among them, and waits for the answer. Greedy."""


def hold(ask: Ask, earlier_texts: Sequence[str] = ()) -> Iterator[Answer]:
    """Ask all questions, each with everything that was said before it.

    ``earlier_texts``: what was answered before, so that each pass over the questions sends the same prompts.
    """
    messages = [{"role": "system", "content": f"{INSTRUCTION}\n\n{DOCUMENT.read_text()}"}]
    for turn, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        answer = ask(question, messages)
        yield answer
        said = earlier_texts[turn] if earlier_texts else answer.text
        messages.append({"role": "assistant", "content": said})


def warm_up(ask: Ask) -> None:
    """A new server's first request pays for what is set up on first use; no measurement should."""
    ask("", [{"role": "user", "content": "Hello."}])
