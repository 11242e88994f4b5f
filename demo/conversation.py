"""A conversation over a long document, through the OpenAI HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

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

# What a single request may ask of the cache, in ``kv_transfer_params``.
WITHOUT_CACHE = {"lmcache.skip_load": True, "lmcache.skip_save": True}


@dataclass(frozen=True)
class Answer:
    """``tokens_by_tier`` tells how many of the ``reused_tokens`` came from "memory" and from "disk"; of them CacheBlend
    computed ``recomputed_tokens`` all the same."""

    question: str
    text: str
    prompt_tokens: int
    reused_tokens: int
    tokens_by_tier: dict[str, int]
    seconds_to_first_token: float
    recomputed_tokens: int = 0


@dataclass
class Conversation:
    """``earlier_texts``: what was answered before, so that each pass over the questions sends the same prompts."""

    url: str
    earlier_texts: list[str] = field(default_factory=list)

    def hold(self, kv_transfer_params: dict[str, Any] | None = None) -> Iterator[Answer]:
        """Ask all questions, each with everything that was said before it. Greedy."""
        messages = [{"role": "system", "content": f"{INSTRUCTION}\n\n{DOCUMENT.read_text()}"}]
        for turn, question in enumerate(QUESTIONS):
            messages.append({"role": "user", "content": question})
            answer = ask(self.url, question, messages, kv_transfer_params)
            yield answer
            said = self.earlier_texts[turn] if self.earlier_texts else answer.text
            messages.append({"role": "assistant", "content": said})

    def warm_up(self) -> None:
        """A new server's first request pays for what is set up on first use; no measurement should."""
        ask(self.url, "", [{"role": "user", "content": "Hello."}], WITHOUT_CACHE)


def ask(
    url: str, question: str, messages: list[dict[str, str]], params: dict[str, Any] | None, salt: str | None = None
) -> Answer:
    """One chat completion. Requests with different ``salt`` share nothing."""
    body = {
        "model": SERVED_NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "kv_transfer_params": params,
    }
    if salt is not None:
        body["cache_salt"] = salt
    start = time.perf_counter()
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    seconds = time.perf_counter() - start
    response.raise_for_status()
    reply = response.json()
    reuse = (reply.get("kv_transfer_params") or {}).get("lmcache", {})
    return Answer(
        question=question,
        text=reply["choices"][0]["message"]["content"],
        prompt_tokens=reply["usage"]["prompt_tokens"],
        reused_tokens=reuse.get("reused_tokens", 0),
        tokens_by_tier=reuse.get("tokens_by_tier", {}),
        # vLLM tells what was reused only in replies that are not streamed. Such a reply is here once its last token
        # is, so we take off the time between first and last token, which vLLM tells as well.
        seconds_to_first_token=seconds - reply["metrics"]["generation_time_ms"] / 1000,
        recomputed_tokens=(reuse.get("blend") or {}).get("recomputed_tokens", 0),
    )
