"""Finds passages between separators that were put into a prompt as text, whatever tokens they have become."""

from __future__ import annotations

from collections.abc import Iterator

from lmcache.keys import Tokens
from lmcache.observability.logging import init_logger
from lmcache.segmentation.token_text import Tokenizer, TokenReader

logger = init_logger(__name__)

# What may stand beside a separator, of every kind that pre-tokenizers tell from each other.
_NEIGHBOURS = ("w", "W", "7", ".", "#", "-", ")", "'s", " ", "  ", "\n", "é", "中")


class SeparatorFinder:
    """Cuts prompts at a separator text.

    A tokenizer may merge a separator with what stands around it. Every token that has any byte of a separator counts
    as the separator, so a passage begins and ends between tokens, at places that its own text decides: the same text
    between two separators has the same tokens in every prompt, as far as the tokenizer can be held to that (see
    :meth:`__init__`). Special tokens are text, with their names; a separator in the text of a user is one too.

    White space at the outer ends of a separator may be missing where a prompt begins or ends, where it gets lost.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str, reader: TokenReader | None = None) -> None:
        """Tries the separator between all kinds of neighbours (milliseconds) and warns if these change the tokens of a
        passage, as with letters, which become parts of words.

        Args:
            tokenizer: that of the prompts.
            separator: not empty.
            reader: of the same tokenizer, if there is one already.

        Raises:
            ValueError: the separator is empty or does not survive the tokenizer (which may drop or rewrite characters),
                or the tokenizer is of an unknown kind.
        """
        if not separator:
            raise ValueError("the separator is empty: it must have at least one character")
        self._reader = reader or TokenReader(tokenizer)
        self._separator = separator.encode()
        core = self._separator.strip() or self._separator
        self._lead, self._tail = self._separator.split(core, 1)
        self._try_out(tokenizer, separator)

    def passages(self, tokens: Tokens) -> list[tuple[int, int]]:
        """The half-open ranges of tokens between separators, ascending; none is empty.

        They cover all tokens that are not of a separator. A prompt without one is a single passage.
        """
        text = self._reader.read(tokens)
        passages = []
        start = 0
        for place in self._places(text.data):
            first, last = text.tokens_touching(*place)
            if start < first:
                passages.append((start, first))
            start = last
        if start < len(tokens):
            passages.append((start, len(tokens)))
        return passages

    def _places(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Where the bytes of separators are, from left to right, without overlap."""
        # With the white space put back that may be missing at the ends; it is not counted.
        padded = self._lead + data + self._tail
        at = padded.find(self._separator)
        while at >= 0:
            start = at - len(self._lead)
            yield max(start, 0), min(start + len(self._separator), len(data))
            at = padded.find(self._separator, at + len(self._separator))

    def _try_out(self, tokenizer: Tokenizer, separator: str) -> None:
        seen: dict[bytes, list[int]] = {}
        stable = True
        for inner in _NEIGHBOURS:
            for outer in _NEIGHBOURS:
                prompt = f"text{outer}{separator}{inner}one two{inner}{separator}{outer}text"
                tokens = tokenizer.encode(prompt, add_special_tokens=False)
                text = self._reader.read(tokens)
                places = list(self._places(text.data))
                if len(places) < 2:
                    raise ValueError(
                        f"separator {separator!r}: the tokenizer does not keep it, {prompt!r} becomes "
                        f"{text.data.decode(errors='replace')!r}; choose another, like ' # # '"
                    )
                left, right = places[:2]
                between = tokens[text.tokens_touching(*left)[1] : text.tokens_touching(*right)[0]]
                stable &= seen.setdefault(text.data[left[1] : right[0]], between) == between
        if not stable:
            logger.warning(
                "separator %r: with this tokenizer the tokens of a passage depend on what stands before or behind its "
                "separators, so its KV will often not be found again; choose one like ' # # '",
                separator,
            )
