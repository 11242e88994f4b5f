"""The text that token ids stand for, byte by byte: which tokens a place in it lies in, and the other way round."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lmcache.keys import Tokens, token_array


class Tokenizer(Protocol):
    """All that is asked of a tokenizer; those of transformers and of vLLM have it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: list[int], *, skip_special_tokens: bool = ...) -> list[Any]: ...


class TokenText:
    """The text of a row of tokens, in UTF-8; special tokens stand for their names, as in a chat template.

    What the tokenizer itself puts at the beginning is no text: the BOS, and the space of SentencePiece.
    """

    def __init__(self, data: bytes, borders: npt.NDArray[np.int64]) -> None:
        """Token ``i`` is the bytes from ``borders[i]`` to ``borders[i + 1]``, which may be parts of characters."""
        self.data = data
        self._begins, self._ends = borders[:-1], borders[1:]

    @cached_property
    def num_chars(self) -> int:
        return len(self._char_starts)

    def byte_range(self, start: int, end: int) -> tuple[int, int]:
        """Where in :attr:`data` the characters (code points) ``[start, end)`` are; ``0 ≤ start ≤ end ≤ num_chars``."""
        starts = self._char_starts
        first, last = (int(starts[char]) if char < len(starts) else len(self.data) for char in (start, end))
        return first, last

    def tokens_within(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that lie wholly in bytes ``[start, end)``; an empty range if there are none.

        Tokens without text are not inside where they are at its ends.
        """
        first = max(self._begins.searchsorted(start), self._ends.searchsorted(start, side="right"))
        last = min(self._ends.searchsorted(end, side="right"), self._begins.searchsorted(end))
        return int(first), int(max(first, last))

    def tokens_touching(self, start: int, end: int) -> tuple[int, int]:
        """The tokens of which any byte lies in ``[start, end)``, a range that is not empty."""
        return int(self._ends.searchsorted(start, side="right")), int(self._begins.searchsorted(end))

    @cached_property
    def _char_starts(self) -> npt.NDArray[np.int64]:
        continues = (np.frombuffer(self.data, np.uint8) & 0xC0) == 0x80
        starts: npt.NDArray[np.int64] = np.flatnonzero(~continues)
        return starts


class TokenReader:
    """Turns token ids into their text; what a token stands for is looked up when it is first seen. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises:
        ValueError: the tokenizer writes its tokens in a way that is not known here.
        """
        self._tokenizer = tokenizer
        self._to_bytes = _notation(tokenizer)
        self._lock = threading.Lock()
        # The bytes of all tokens seen so far, one after the other; by token id, where its own begin, and how many they
        # are, −1 for a token that was not seen.
        self._bytes = np.empty(0, np.uint8)
        self._starts = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)
        self._leading_ids = tokenizer.encode("", add_special_tokens=True)
        self._adds_space = self._joined(token_array(_plain_ids(tokenizer, "a")))[0].startswith(b" ")

    def read(self, tokens: Tokens) -> TokenText:
        """The text of a prompt, or of as much of it as there is, from its first token on.

        Raises:
            ValueError: ``tokens`` is not a row of token ids.
        """
        ids = token_array(tokens)
        data, borders = self._joined(ids)
        leading = takewhile(lambda pair: pair[0] == pair[1], zip(self._leading_ids, ids, strict=False))
        skip = int(borders[sum(1 for _ in leading)])
        if self._adds_space and data.startswith(b" ", skip):
            skip += 1
        return TokenText(data[skip:], np.maximum(borders - skip, 0))

    def _joined(self, ids: npt.NDArray[np.uint32]) -> tuple[bytes, npt.NDArray[np.int64]]:
        """The bytes of all tokens, and where each begins, and the last ends."""
        borders = np.zeros(len(ids) + 1, np.int64)
        with self._lock:
            self._learn(ids)
            lengths = self._lengths[ids]
            np.cumsum(lengths, out=borders[1:])
            places = np.repeat(self._starts[ids] - borders[:-1], lengths)
            places += np.arange(len(places))
            return self._bytes[places].tobytes(), borders

    def _learn(self, ids: npt.NDArray[np.uint32]) -> None:
        top = int(ids.max(initial=0))
        if top >= _MAX_TOKEN_ID:
            raise ValueError(f"token id {top} is of no vocabulary: must be below {_MAX_TOKEN_ID}")
        if top >= len(self._lengths):
            more = (1 << top.bit_length()) - len(self._lengths)
            self._starts = np.append(self._starts, np.zeros(more, np.int64))
            self._lengths = np.append(self._lengths, np.full(more, -1, np.int64))
        new = np.unique(ids[self._lengths[ids] < 0])
        if not len(new):
            return
        pieces = [self._to_bytes(_piece(self._tokenizer, token)) for token in new.tolist()]
        ends = len(self._bytes) + np.cumsum([len(piece) for piece in pieces])
        self._bytes = np.append(self._bytes, np.frombuffer(b"".join(pieces), np.uint8))
        self._lengths[new] = [len(piece) for piece in pieces]
        self._starts[new] = ends - self._lengths[new]


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _piece(tokenizer: Tokenizer, token: int) -> str | bytes:
    piece: str | bytes | None = tokenizer.convert_ids_to_tokens([token], skip_special_tokens=False)[0]
    if isinstance(piece, str) and "\ufffd" in piece:
        # Part of a character: vLLM's Mistral tokenizer gives its bytes only when it skips special tokens.
        ordinary = tokenizer.convert_ids_to_tokens([token], skip_special_tokens=True)
        return ordinary[0] if ordinary else piece
    # An id without a token. No text has this byte, so nothing is found across it.
    return b"\xff" if piece is None else piece


def _notation(tokenizer: Tokenizer) -> Callable[[str | bytes], bytes]:
    """How this tokenizer writes its tokens, told by how it writes a space."""
    sample = "a b"
    pieces = [_piece(tokenizer, token) for token in _plain_ids(tokenizer, sample)]
    for notation in (_verbatim, _byte_level, _sentencepiece):
        if b"".join(map(notation, pieces)).strip() == sample.encode():
            return notation
    raise ValueError(
        f"tokenizer {type(tokenizer).__name__}: cannot tell the text of its tokens, {sample!r} is written {pieces}; "
        "known are byte-level BPE, SentencePiece, and tokens in plain text or bytes"
    )


def _byte_level(piece: str | bytes) -> bytes:
    """The alphabet of GPT-2: a printable character for every byte."""
    if isinstance(piece, bytes):
        return piece
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:  # an added token, which is written as it is
        return piece.encode()


def _sentencepiece(piece: str | bytes) -> bytes:
    """A "▁" is a space, "<0x0A>" a byte."""
    if isinstance(piece, bytes):
        return piece
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _verbatim(piece: str | bytes) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _byte_alphabet() -> dict[str, int]:
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_MAX_TOKEN_ID = 1 << 21
_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
