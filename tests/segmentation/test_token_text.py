"""What text tokens stand for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from lmcache.segmentation.token_text import TokenReader, TokenText
from tests.segmentation.texts import texts
from tests.segmentation.tokenizers import BOS, TiktokenLike


@given(text=texts)
def test_the_text_of_a_prompt_comes_back(tokenizer, text):
    prompt = f"x{text}"
    for special in (True, False):
        tokens = tokenizer.encode(prompt, add_special_tokens=special)
        assert TokenReader(tokenizer).read(tokens).data.decode() == prompt


def test_what_the_tokenizer_puts_first_is_no_text(tokenizer):
    reader = TokenReader(tokenizer)
    tokens = tokenizer.encode("Hello")
    text = reader.read(tokens)
    assert text.data == b"Hello"
    assert text.num_chars == 5
    first, last = text.tokens_within(0, 5)
    assert last == len(tokens)
    assert reader.read(tokens[:first]).data == b""
    assert reader.read(tokens[: first + 1]).data != b"", "a token that begins with an added space is text"
    assert reader.read(tokenizer.encode("")).data == b""
    assert reader.read([]).data == b""


def test_a_prompt_may_be_any_row_of_integers():
    reader = TokenReader(TiktokenLike())
    tokens = TiktokenLike().encode("the thing")
    for row in (tokens, tuple(tokens), np.array(tokens, np.uint32), np.array(tokens), torch.tensor(tokens)):
        assert reader.read(row).data == b"the thing"


@st.composite
def spread_texts(draw):
    """A text, and the borders of tokens, which may lie inside of characters and on one another."""
    data = draw(texts).encode()
    borders = sorted(draw(st.lists(st.integers(0, len(data)), max_size=20)))
    return data, [0, *borders, len(data)]


@given(spread_texts(), st.data())
def test_characters_and_their_tokens(spread, more):
    data, borders = spread
    text = TokenText(data, np.array(borders))
    chars = data.decode()
    assert text.num_chars == len(chars)
    end = more.draw(st.integers(0, len(chars)))
    start = more.draw(st.integers(0, end))
    first, last = text.byte_range(start, end)
    assert data[first:last].decode() == chars[start:end]
    if start == end:
        return
    spans = list(pairwise(borders))
    touching = range(*text.tokens_touching(first, last))
    assert [i for i in touching if spans[i][0] < spans[i][1]] == [
        i for i, (a, b) in enumerate(spans) if a < b and a < last and b > first
    ]
    within = range(*text.tokens_within(first, last))
    assert [i for i in within if spans[i][0] < spans[i][1]] == [
        i for i, (a, b) in enumerate(spans) if a < b and first <= a and b <= last
    ]
    if within:
        assert all(first <= spans[i][0] and spans[i][1] <= last for i in within)
        assert spans[within[0]][1] > first, "no token without text at the beginning, as a BOS is"
        assert spans[within[-1]][0] < last


class Counting(TiktokenLike):
    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def convert_ids_to_tokens(self, ids, *, skip_special_tokens=False):
        self.asked.update(ids)
        return super().convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)


def test_only_tokens_that_are_seen_are_looked_up_and_once():
    tokenizer = Counting()
    reader = TokenReader(tokenizer)
    tokenizer.asked.clear()
    for _ in range(3):
        reader.read(tokenizer.encode("the thing in it"))
    assert set(tokenizer.asked) <= set(tokenizer.encode("the thing in it"))
    assert set(tokenizer.asked.values()) == {1}


class WithHoles(TiktokenLike):
    """As transformers does with an id that is of no token."""

    def convert_ids_to_tokens(self, ids, *, skip_special_tokens=False):
        return [None if token > 5000 else super(WithHoles, self).convert_ids_to_tokens([token])[0] for token in ids]


def test_an_id_without_a_token_is_no_text():
    tokenizer = WithHoles()
    a, b = (tokenizer.encode(char, add_special_tokens=False) for char in "ab")
    data = TokenReader(tokenizer).read([*a, 5001, *b]).data
    assert data.startswith(b"a")
    assert data.endswith(b"b")
    with pytest.raises(UnicodeDecodeError):
        data.decode()


def test_special_tokens_stand_for_their_names():
    tokenizer = TiktokenLike()
    bos = tokenizer.encode("")
    a = tokenizer.encode("a", add_special_tokens=False)
    assert TokenReader(tokenizer).read([*bos, *a, *bos, *a]).data == f"a{BOS}a".encode()


class Words(TiktokenLike):
    """Leaves out spaces, as a tokenizer of words does."""

    def encode(self, text, *, add_special_tokens=True):
        return super().encode(text.replace(" ", ""), add_special_tokens=add_special_tokens)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="tokenizer Words: cannot tell"):
        TokenReader(Words())
    reader = TokenReader(TiktokenLike())
    with pytest.raises(ValueError, match="token id 4294967295"):
        reader.read([1, 2**32 - 1])
    with pytest.raises(ValueError, match="token ids must be integers"):
        reader.read([-1])
