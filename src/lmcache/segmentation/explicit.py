"""Passages that a request names itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from lmcache.keys import Tokens
from lmcache.segmentation.token_text import TokenReader, TokenText

PARAMETER = "lmcache.segments"
"""In the ``kv_transfer_params`` of a request: ``[{"start": 12, "end": 400, "unit": "char"}, …]``."""

_Index = Annotated[int, msgspec.Meta(ge=0)]


class _Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The half-open range ``[start, end)`` of a prompt."""

    start: _Index
    end: _Index
    unit: Literal["token", "char"] = "token"


def explicit_passages(value: Any, tokens: Tokens, reader: TokenReader | None = None) -> list[tuple[int, int]]:
    """The half-open ranges of tokens that ``value`` names, ascending, disjoint, none empty.

    A range of characters (code points of the prompt as the tokenizer keeps it, without the BOS that it adds; special
    tokens with their names) stands for the tokens that lie wholly inside; it is left out if there are none.

    Args:
        value: what was sent as :data:`PARAMETER`, decoded from JSON; its order does not matter.
        tokens: of the prompt.
        reader: of the tokenizer that ``tokens`` come from; only ranges of characters need it.

    Raises:
        ValueError: ``value`` is not such a list, or a range is empty, not inside the prompt, overlaps another, or is
            of characters without a ``reader``. The message names the entry.
    """
    try:
        segments = msgspec.convert(value, list[_Segment])
    except msgspec.ValidationError as error:
        message = str(error)
        place = "" if "`$" in message else f" - at `{PARAMETER}`"
        raise ValueError(message.replace("`$", f"`{PARAMETER}") + place) from None
    text: TokenText | None = None
    passages: list[_Placed] = []
    chars: list[_Placed] = []
    for entry, segment in enumerate(segments):
        start, end = segment.start, segment.end
        if segment.unit == "token":
            _check_bounds(entry, segment, len(tokens))
        else:
            text = text or _text(entry, tokens, reader)
            _check_bounds(entry, segment, text.num_chars)
            chars.append((start, end, entry))
            start, end = text.tokens_within(*text.byte_range(start, end))
        if start < end:
            passages.append((start, end, entry))
    # Characters may overlap where the whole tokens in them do not.
    _refuse_overlap(chars)
    _refuse_overlap(passages)
    return sorted((start, end) for start, end, _ in passages)


_Placed: TypeAlias = tuple[int, int, int]  # start, end, which entry


def _text(entry: int, tokens: Tokens, reader: TokenReader | None) -> TokenText:
    if reader is None:
        raise ValueError(f"{PARAMETER}[{entry}]: ranges of characters need the tokenizer; without one, send tokens")
    return reader.read(tokens)


def _check_bounds(entry: int, segment: _Segment, length: int) -> None:
    start, end, unit = segment.start, segment.end, segment.unit
    if start >= end:
        raise ValueError(f"{PARAMETER}[{entry}]: [{start}, {end}) is empty: end must be greater than start")
    if end > length:
        raise ValueError(f"{PARAMETER}[{entry}]: [{start}, {end}) ends behind the prompt, which has {length} {unit}s")


def _refuse_overlap(ranges: list[_Placed]) -> None:
    for (*_, end, left), (start, _, right) in pairwise(sorted(ranges)):
        if start < end:
            raise ValueError(f"{PARAMETER}[{right}] overlaps {PARAMETER}[{left}]: a token can be in one passage only")
