"""SGLang's OpenAI HTTP API."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from demo.conversation import MAX_TOKENS, SERVED_NAME, Answer

STORAGE = "storage"  # what SGLang calls all that did not come from its own cache


def ask(
    url: str,
    question: str,
    messages: list[dict[str, str]],
    salt: str | None = None,
    params: dict[str, Any] | None = None,
    request_id: str | None = None,
) -> Answer:
    """One chat completion, streamed. Requests with different ``salt`` share nothing; ``params`` are said to us."""
    body = {
        "model": SERVED_NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "cache_salt": salt,
        "custom_params": params,
        "rid": request_id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_cached_tokens_details": True,
    }
    text, prompt_tokens, seconds = "", 0, 0.0
    cached: dict[str, int] = {}
    start = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            part = json.loads(data)
            for choice in part["choices"]:
                said = choice["delta"].get("content") or ""
                if not seconds and (said or choice["finish_reason"]):
                    seconds = time.perf_counter() - start
                text += said
            if usage := part.get("usage"):
                prompt_tokens = usage["prompt_tokens"]
            cached = (part.get("sglext") or {}).get("cached_tokens_details") or cached
    by_tier = {"SGLang's own cache": cached.get("device", 0), STORAGE: cached.get("storage", 0)}
    by_tier = {tier: tokens for tier, tokens in by_tier.items() if tokens}
    return Answer(question, text, prompt_tokens, sum(by_tier.values()), by_tier, seconds)
