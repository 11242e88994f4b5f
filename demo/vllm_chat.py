"""vLLM's OpenAI HTTP API, with what our connector adds to its replies."""

from __future__ import annotations

import time
from typing import Any

import httpx

from demo.conversation import MAX_TOKENS, SERVED_NAME, Answer


def ask(
    url: str,
    question: str,
    messages: list[dict[str, str]],
    params: dict[str, Any] | None = None,
    salt: str | None = None,
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
        milliseconds=reuse.get("milliseconds", {}),
    )
