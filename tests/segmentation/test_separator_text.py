"""Passages between separators that are text."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache
from itertools import accumulate, pairwise
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lmcache.segmentation.separator_text import SeparatorFinder
from lmcache.segmentation.token_text import TokenReader
from tests.segmentation.texts import texts
from tests.segmentation.tokenizers import BOS, TiktokenLike

SEPARATOR = " # # "


@pytest.fixture(scope="module")
def cut(tokenizer):
    """A prompt's tokens, and its passages by :class:`SeparatorFinder` as ranges and as texts."""
    reader = TokenReader(tokenizer)
    finder = SeparatorFinder(tokenizer, SEPARATOR, reader)

    def cut(prompt, add_special_tokens=True):
        tokens = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        ranges = finder.passages(tokens)
        borders = borders_of(reader, tokens)
        data = reader.read(tokens).data
        texts = [data[borders[start] : borders[end]].decode(errors="replace") for start, end in ranges]
        return SimpleNamespace(tokens=tokens, ranges=ranges, texts=texts, borders=borders)

    return cut


def borders_of(reader, tokens):
    """Where tokens begin and the last ends; what the tokenizer put before the text is cut off at the left."""
    ends = list(accumulate((length_of(reader, token) for token in tokens), initial=0))
    added = ends[-1] - len(reader.read(tokens).data)
    return [max(end - added, 0) for end in ends]


@cache
def length_of(reader, token):
    """The bytes of a token that is not the first."""
    return len(reader.read([token] * 3).data) - len(reader.read([token] * 2).data)


def occurrences(prompt):
    """The bytes of the separators of ``prompt``."""
    places, end = [], 0
    for part in prompt.split(SEPARATOR)[:-1]:
        start = end + len(part.encode())
        end = start + len(SEPARATOR)
        places.append((start, end))
    return places


def expected_ranges(prompt, borders):
    """All tokens but those that share a byte with a separator."""
    free = [
        not any(start < right and end > left for left, right in occurrences(prompt)) for start, end in pairwise(borders)
    ]
    edges = [i for i, (before, now) in enumerate(pairwise([False, *free, False])) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


prompts = st.lists(texts, min_size=1, max_size=5).map(lambda parts: f"x{SEPARATOR.join(parts)}x")


@given(prompt=prompts)
def test_passages_are_all_tokens_but_those_of_separators(cut, prompt):
    prompt = unicodedata.normalize("NFC", prompt)
    for special in (True, False):
        found = cut(prompt, special)
        assert found.ranges == expected_ranges(prompt, found.borders)


@given(
    passages=st.lists(texts.filter(str.strip), min_size=3, max_size=3), outer=st.lists(texts, min_size=2, max_size=2)
)
def test_a_passage_has_the_same_tokens_in_every_prompt(cut, passages, outer):
    seen = {}
    a, b, c = passages
    for first, *middle, last in ([outer[0], a, b, c, outer[1]], [outer[1], c, a, b, outer[0]], [a, c, b, b, a]):
        prompt = unicodedata.normalize("NFC", SEPARATOR.join([f"x{first}", *middle, f"{last}x"]))
        found = cut(prompt)
        for (_, left), (right, _) in pairwise(occurrences(prompt)):
            inside = [range_ for range_ in found.ranges if left <= found.borders[range_[0]] < right]
            assert len(inside) <= 1
            tokens = [found.tokens[start:end] for start, end in inside]
            assert seen.setdefault(prompt.encode()[left:right], tokens) == tokens


def test_nearly_all_of_a_passage_is_found(cut):
    passage = "Retrieval finds passages. A cache keeps what was computed for them, wherever they stand next time."
    found = cut(SEPARATOR.join(["You are a helpful assistant.", passage, passage[::-1], "What is kept?"]))
    assert len(found.texts) == 4
    _, middle, _, last = found.texts
    assert passage.endswith(middle)
    assert len(passage) - len(middle) <= len("Retrieval"), "at most the word that has the separator's last space"
    assert "What is kept?".endswith(last)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("one two three", 1),
        (f"one two{SEPARATOR}three four", 2),
        (f"{SEPARATOR}one two", 1),
        (f"one two{SEPARATOR}", 1),
        (f"{SEPARATOR}{SEPARATOR}one two{SEPARATOR}{SEPARATOR}three four{SEPARATOR}{SEPARATOR}", 2),
        (SEPARATOR, 0),
        ("", 0),
        ("one # two", 1),
        ("one # #two", 1),
    ],
    ids=["none", "one", "first", "last", "in a row", "nothing else", "nothing", "half of one", "most of one"],
)
def test_where_separators_stand(cut, prompt, count):
    # Without those of only what the tokenizer itself puts first.
    assert len(list(filter(None, cut(prompt).texts))) == count


def test_the_outer_white_space_may_be_lost_at_the_ends(cut):
    inner = f"one two{SEPARATOR}three four"
    full, bare = cut(f"{SEPARATOR}{inner}{SEPARATOR}"), cut(f"# # {inner} # #")
    assert [text for text in full.texts if text] == [text for text in bare.texts if text]
    assert len(cut(f"#{inner}").ranges) == 2, "the white space is all that may be missing"


def test_a_bos_belongs_to_the_first_passage():
    tokenizer = TiktokenLike()
    tokens = tokenizer.encode(f"one{SEPARATOR}six")
    finder = SeparatorFinder(tokenizer, SEPARATOR)
    (start, first_end), (second, end) = finder.passages(tokens)
    assert (start, end) == (0, len(tokens))
    assert tokens[0] == tokenizer.encode("")[0]
    assert (tokens[1:first_end], tokens[second:]) == tuple(
        tokenizer.encode(text, add_special_tokens=False) for text in ("one", "six")
    )


@pytest.mark.parametrize("separator", [BOS, "begin_of"])
def test_a_separator_may_be_a_special_token_or_a_part_of_its_name(separator):
    tokenizer = TiktokenLike()
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in ("one", "two"))
    special = tokenizer.encode("")
    found = SeparatorFinder(tokenizer, separator).passages([*one, *special, *two, *special])
    assert found == [(0, len(one)), (len(one) + 1, len(one) + 1 + len(two))]


def test_the_characters_of_a_separator_may_be_several_tokens():
    tokenizer = TiktokenLike()
    tokens = tokenizer.encode("one🙂§two🙂§three", add_special_tokens=False)
    passages = SeparatorFinder(tokenizer, "🙂§").passages(tokens)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in ("one", "two", "three")]
    assert [tokens[start:end] for start, end in passages] == expected


def test_the_default_separator_is_as_good_as_can_be(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "lmcache"):
        SeparatorFinder(tokenizer, SEPARATOR)
    assert not caplog.records


def test_letters_are_no_good_separator(caplog):
    with caplog.at_level(logging.WARNING, "lmcache"):
        SeparatorFinder(TiktokenLike(merges=[b"Wa", b"ab", b"bw"]), "ab")
    assert "separator 'ab'" in caplog.text


class Lowering(TiktokenLike):
    def encode(self, text, *, add_special_tokens=True):
        return super().encode(text.lower(), add_special_tokens=add_special_tokens)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="separator is empty"):
        SeparatorFinder(TiktokenLike(), "")
    with pytest.raises(ValueError, match=r"separator ' SEP ': the tokenizer does not keep it.* sep "):
        SeparatorFinder(Lowering(), " SEP ")
