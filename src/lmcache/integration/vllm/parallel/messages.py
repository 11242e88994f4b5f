"""What the scheduler role asks the ranks, and what they answer, where these live in processes of their own.

The KV itself never travels this way: a rank holds what it found under a name, until the worker role of the same process
uses it or the scheduler lets it go.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from lmcache.keys import DIGEST_BYTES

PROTOCOL = 1


class Hello(msgspec.Struct, tag=True, frozen=True):
    """First message of a connection, in both directions: are these two parts of one engine?"""

    protocol: int
    world_size: int
    rank: int


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Ask for :class:`Description`."""


class Description(msgspec.Struct, tag=True, frozen=True):
    """``layout`` is the host layout of the rank's chunks; empty while it does not know its pages, or cannot use them.
    ``blends`` says whether its model can be blended."""

    layout: str = ""
    blends: bool = False


class LookUp(msgspec.Struct, tag=True, frozen=True):
    """Hold the leading chunks of a prompt under ``lease``. Answered by :class:`LeaseState`.

    ``digests`` are those of the chunks, 32 bytes each; the namespace is made of ``lora``, ``cache_salt`` and the rank's
    own shard.
    """

    lease: str
    num_tokens: int
    digests: bytes
    lora: str
    cache_salt: str


class Look(msgspec.Struct, tag=True, frozen=True):
    """Ask how a lease is getting on; with ``cut`` it becomes content with what has arrived."""

    lease: str
    cut: bool = False


class LeaseState(msgspec.Struct, tag=True, frozen=True):
    """``num_tokens`` are held from the start of the prompt, those of ``ready`` leases for good. ``tiers`` tells where
    they came from: runs of ``(tier, end)``, one behind the other."""

    num_tokens: int = 0
    ready: bool = True
    tiers: tuple[tuple[str, int], ...] = ()


class Release(msgspec.Struct, tag=True, frozen=True):
    """Give up a lease that was not used. Not answered."""

    lease: str


class MatchPiece(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`lmcache.segmentation.passage_index.Piece`; its chunk has this ``digest`` and kind of key."""

    start: int
    end: int
    offset: int
    digest: bytes
    is_prefix: bool


class Match(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`lmcache.segmentation.passage_index.PassageMatch`."""

    start: int
    end: int
    old_start: int
    pieces: tuple[MatchPiece, ...]


class FindPassages(msgspec.Struct, tag=True, frozen=True):
    """Ask one rank what is known of ``tokens[start:]``, for all. Answered by :class:`Matches`.

    ``tokens`` are little-endian uint32; ``ranges`` are those of the passages, where they are known.
    """

    tokens: bytes
    start: int
    ranges: list[tuple[int, int]] | None
    lora: str
    cache_salt: str


class Matches(msgspec.Struct, tag=True, frozen=True):
    matches: tuple[Match, ...]


class HoldPassages(msgspec.Struct, tag=True, frozen=True):
    """Hold the chunks of ``matches`` under ``lease``. Answered by :class:`PassagesState`."""

    lease: str
    matches: tuple[Match, ...]
    lora: str
    cache_salt: str


class LookAtPassages(msgspec.Struct, tag=True, frozen=True):
    """:class:`Look` for a lease of passages."""

    lease: str
    cut: bool = False


class PassagesState(msgspec.Struct, tag=True, frozen=True):
    """``tiers``: for each piece of each match where it came from; empty for one that is not held."""

    ready: bool
    tiers: list[list[str]]


class AreSaving(msgspec.Struct, tag=True, frozen=True):
    """Ask whether the chunk that the scheduler calls ``key`` is being saved at this moment."""

    key: bytes


class Answer(msgspec.Struct, tag=True, frozen=True):
    yes: bool


class WhatBecameOf(msgspec.Struct, tag=True, frozen=True):
    """Ask about a request that was to load or blend. Answered by :class:`Outcome`; ``forget``: it has ended."""

    req_id: str
    forget: bool


class Outcome(msgspec.Struct, tag=True, frozen=True):
    """``report`` is the JSON of ``kv_transfer_params.lmcache.blend``; empty without a blend."""

    failed: bool = False
    report: bytes = b""


class Clear(msgspec.Struct, tag=True, frozen=True):
    """Forget everything, once the saves under way are done. Answered by :class:`Answer`."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The answer to a message that the rank could not act upon; ``reason`` in words."""

    reason: str


Request: TypeAlias = (
    Hello
    | Describe
    | LookUp
    | Look
    | FindPassages
    | HoldPassages
    | LookAtPassages
    | Release
    | AreSaving
    | WhatBecameOf
    | Clear
)
Reply: TypeAlias = Hello | Description | LeaseState | Matches | PassagesState | Answer | Outcome | Refused


def split_digests(digests: bytes) -> list[bytes]:
    """Raises:
    ValueError: not a whole number of digests.
    """
    if len(digests) % DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes are no row of digests of {DIGEST_BYTES} bytes")
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]
