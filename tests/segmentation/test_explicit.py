"""Passages that a request names itself."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lmcache.segmentation.explicit import explicit_passages
from lmcache.segmentation.token_text import TokenReader
from tests.segmentation.tokenizers import TiktokenLike

TOKENS = list(range(100))


def token(start, end):
    return {"start": start, "end": end}


def char(start, end):
    return {"start": start, "end": end, "unit": "char"}


@pytest.mark.parametrize(
    ("value", "passages"),
    [
        ([], []),
        ([token(0, 100)], [(0, 100)]),
        ([token(50, 60), token(0, 10), {**token(10, 50), "unit": "token"}], [(0, 10), (10, 50), (50, 60)]),
    ],
    ids=["none", "everything", "in any order, side by side"],
)
def test_ranges_of_tokens(value, passages):
    assert explicit_passages(value, TOKENS) == passages


@given(st.lists(st.integers(0, 100), max_size=20, unique=True), st.randoms())
def test_any_disjoint_ranges_come_back_in_order(borders, random):
    borders = sorted(borders)
    ranges = list(zip(borders[::2], borders[1::2], strict=False))
    shuffled = random.sample(ranges, len(ranges))
    assert explicit_passages([token(*each) for each in shuffled], TOKENS) == ranges


def test_ranges_of_characters():
    tokenizer = TiktokenLike()
    reader = TokenReader(tokenizer)
    prompt = "é the thing 🙂 in it"
    tokens = tokenizer.encode(prompt)

    def texts(*ranges):
        return [
            b"".join(tokenizer.convert_ids_to_tokens(tokens[start:end])).decode()
            for start, end in explicit_passages([char(*each) for each in ranges], tokens, reader)
        ]

    assert texts((0, len(prompt))) == [prompt], "without the BOS"
    assert texts((2, 11)) == [" thing"], "' the' has a character outside"
    assert texts((12, 13)) == ["🙂"], "a character of several tokens"
    assert texts((13, 16), (0, 1)) == ["é", " in"]
    assert texts((2, 4)) == [], "no whole token"
    assert explicit_passages([char(0, 1), token(10, 11)], tokens, reader) == [(1, 3), (10, 11)]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (token(0, 1), r"array.* at `lmcache\.segments`"),
        ("[]", r"array.* at `lmcache\.segments`"),
        (None, r"array.* at `lmcache\.segments`"),
        ([[0, 1]], r"at `lmcache\.segments\[0\]`"),
        ([token(0, 1), token("1", 2)], r"`int`.*`str` - at `lmcache\.segments\[1\]\.start`"),
        ([token(0, 1.5)], r"`int`.*`float` - at `lmcache\.segments\[0\]\.end`"),
        ([token(0, True)], r"`int`.*`bool` - at `lmcache\.segments\[0\]\.end`"),
        ([token(-1, 1)], r"`int` >= 0 - at `lmcache\.segments\[0\]\.start`"),
        ([{"start": 0}], r"`end` - at `lmcache\.segments\[0\]`"),
        ([{**token(0, 1), "unti": "char"}], r"`unti` - at `lmcache\.segments\[0\]`"),
        ([{**token(0, 1), "unit": "byte"}], r"'byte' - at `lmcache\.segments\[0\]\.unit`"),
        ([token(0, 1), token(5, 5)], r"lmcache\.segments\[1\]: \[5, 5\) is empty"),
        ([token(7, 5)], r"lmcache\.segments\[0\]: \[7, 5\) is empty"),
        ([token(0, 1), token(50, 101)], r"lmcache\.segments\[1\]: .* behind the prompt, which has 100 tokens"),
        ([token(20, 30), token(0, 5), token(10, 21)], r"lmcache\.segments\[0\] overlaps lmcache\.segments\[2\]"),
        ([token(0, 30), token(5, 6)], r"lmcache\.segments\[1\] overlaps lmcache\.segments\[0\]"),
        ([token(0, 5), token(0, 5)], r"lmcache\.segments\[1\] overlaps lmcache\.segments\[0\]"),
        ([token(0, 5), char(7, 8)], r"lmcache\.segments\[1\]: .* need the tokenizer"),
    ],
)
def test_mistakes_are_named(value, named):
    with pytest.raises(ValueError, match=named):
        explicit_passages(value, TOKENS)


def test_mistakes_in_characters_are_named():
    tokenizer = TiktokenLike()
    reader, tokens = TokenReader(tokenizer), tokenizer.encode("the thing")
    for value, named in (
        ([char(0, 10)], r"segments\[0\]: .* which has 9 chars"),
        ([char(0, 6), char(5, 9)], r"segments\[1\] overlaps"),
        ([char(0, 9), token(1, 2)], r"overlaps"),
    ):
        with pytest.raises(ValueError, match=named):
            explicit_passages(value, tokens, reader)
