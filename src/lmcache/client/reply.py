"""What a reply of the server says about reuse, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class ReplyError(ValueError):
    """A reply tells nothing about reuse, or not what is expected."""


class Segment(msgspec.Struct, frozen=True):
    """Tokens ``[start, end)`` of the prompt were reused; they stood at ``old_start`` when they were computed."""

    start: int
    end: int
    old_start: int
    tokens_by_tier: dict[str, int] = {}


class Blend(msgspec.Struct, frozen=True):
    """Ranges are half-open, in tokens of the prompt. ``fallback`` says why the prompt was not blended."""

    prefix_tokens: int = 0
    segments: list[Segment] = []
    recomputed: list[tuple[int, int]] = []
    recomputed_tokens: int = 0
    policy: str = ""
    corrector: str = ""
    ratio: float = 0.0
    charged_budget: float = 0.0
    milliseconds: dict[str, float] = {}
    fallback: str | None = None


class Reuse(msgspec.Struct, frozen=True):
    """``kv_transfer_params.lmcache`` of a reply. ``milliseconds``: of ``wait`` for the cache, and in its ``hooks``."""

    prompt_tokens: int
    reused_tokens: int
    tier: str | None = None
    tokens_by_tier: dict[str, int] = {}
    milliseconds: dict[str, float] = {}
    blend: Blend | None = None

    def __post_init__(self) -> None:
        """Raises:
        ValueError: a range or a count does not lie in the prompt.
        """
        blend = self.blend or Blend()
        ranges = [(0, self.reused_tokens), (0, blend.prefix_tokens), *blend.recomputed]
        ranges += [(segment.start, segment.end) for segment in blend.segments]
        for start, end in ranges:
            if not 0 <= start <= end <= self.prompt_tokens:
                raise ValueError(f"range [{start}, {end}) is not in a prompt of {self.prompt_tokens} tokens")

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> Reuse:
        """Raises:
        ReplyError: the reply has no such part, or one of another form.
        """
        params = reply.get("kv_transfer_params")
        raw = params.get("lmcache") if isinstance(params, Mapping) else None
        if raw is None:
            raise ReplyError(
                "the reply does not say what was reused: it has no kv_transfer_params.lmcache. "
                "Streamed replies have none, nor has a server without this package's connector"
            )
        try:
            return msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise ReplyError(f"kv_transfer_params.lmcache is not of this version: {error}") from None
