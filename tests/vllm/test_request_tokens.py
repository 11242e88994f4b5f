"""A request's tokens are read once, and are still those that it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmcache.integration.vllm.request_tokens import RequestTokens


@dataclass
class Request:
    """What vLLM's has of these. A session's next message takes the place of what was not computed."""

    all_token_ids: list[int]
    num_prompt_tokens: int
    slices: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def generate(self, tokens: list[int]) -> None:
        self.all_token_ids.extend(tokens)

    def take_message(self, kept: int, tokens: list[int]) -> None:
        del self.all_token_ids[kept:]
        self.all_token_ids.extend(tokens)
        self.num_prompt_tokens = len(self.all_token_ids)


def reader(request: Request) -> RequestTokens:
    return RequestTokens(cast(Any, request))


TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5)


@given(TOKENS, st.lists(st.tuples(st.booleans(), st.integers(0, 3), TOKENS), max_size=6))
def test_they_are_those_of_the_request_at_every_moment(
    prompt: list[int], steps: list[tuple[bool, int, list[int]]]
) -> None:
    request = Request(list(prompt), len(prompt))
    tokens = reader(request)
    for generates, dropped, more in steps:
        assert tokens().tolist() == request.all_token_ids
        if generates:
            request.generate(more)
        else:
            # vLLM keeps a session's prompt, and what was computed behind it.
            kept = max(request.num_prompt_tokens, request.num_tokens - dropped)
            request.take_message(kept, more)
    assert tokens().tolist() == request.all_token_ids


def test_what_was_read_is_not_read_again_and_nobody_can_change_it() -> None:
    tokens = reader(Request([1, 2, 3], 3))
    first = tokens()
    assert np.shares_memory(first, tokens())
    assert not first.flags.writeable
    assert not first[:2].flags.writeable
