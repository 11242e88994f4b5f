"""What is found, against the definition: tried at every place of every chunk, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import CacheKey, Namespace, placed_segment_key, prefix_keys
from lmcache.segmentation.anchors import WINDOW, anchors
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages

TENANTS = [Namespace("model", "bfloat16", "layout", cache_salt=salt) for salt in ("one", "two")]


def text(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype(np.uint32)


def chunks(namespace: Namespace, tokens: np.ndarray, size: int) -> list[KnownChunk]:
    """Full chunks as exact prefixes, the short end as a chunk of its place."""
    keys: list[CacheKey] = list(prefix_keys(namespace, tokens, size))
    cut = [KnownChunk(key, tokens[at * size : (at + 1) * size], at * size) for at, key in enumerate(keys)]
    end = len(keys) * size
    if end < len(tokens):
        cut.append(KnownChunk(placed_segment_key(namespace, tokens[end:], end), tokens[end:], end))
    return cut


def uneven_chunks(namespace: Namespace, tokens: np.ndarray, lengths: list[int]) -> list[KnownChunk]:
    """Any chunk may be short, as where a prompt goes on behind an earlier one's end."""
    cut, start = [], 0
    for length in lengths:
        part = tokens[start : start + length]
        cut.append(KnownChunk(placed_segment_key(namespace, part, start), part, start))
        start += length
    return cut


class Stored(NamedTuple):
    """A prompt whose texts no other prompt has, so that every place is the only one."""

    tenant: Namespace
    tokens: np.ndarray
    chunks: list[KnownChunk]
    seams: list[int]

    def runs(self, dead: set[CacheKey]) -> list[tuple[int, int]]:
        """Tokens that are kept: between the chunks that are gone or too short to be noted."""
        runs: list[tuple[int, int]] = []
        for chunk in self.chunks:
            end = chunk.start + len(chunk.tokens)
            if chunk.key in dead or len(chunk.tokens) < WINDOW:
                continue
            if runs and runs[-1][1] == chunk.start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((chunk.start, end))
        return runs

    def has_anchor(self, start: int, end: int, dead: set[CacheKey]) -> bool:
        """Whether a window of a kept chunk that lies in the tokens ``[start, end)`` is an anchor."""
        for chunk in self.chunks:
            at = anchors(chunk.tokens)[0] + chunk.start
            if chunk.key not in dead and ((at >= start) & (at + WINDOW <= end)).any():
                return True
        return False


class Quote(NamedTuple):
    """``prompt.tokens[start:end]`` stands at ``at`` in the new prompt; perhaps that is told."""

    prompt: Stored
    start: int
    end: int
    at: int
    told: bool


@st.composite
def stored_prompts(draw: st.DrawFn, size: int) -> list[Stored]:
    prompts = []
    for number in range(draw(st.integers(1, 3))):
        tenant, seams = draw(st.sampled_from(TENANTS)), draw(st.lists(st.integers(0, 700), max_size=3))
        if draw(st.booleans()):
            tokens = text(draw(st.integers(0, 700)), number)
            cut = chunks(tenant, tokens, size)
        else:
            lengths = draw(st.lists(st.integers(1, size) | st.integers(WINDOW, size), max_size=10))
            tokens = text(sum(lengths), number)
            cut = uneven_chunks(tenant, tokens, lengths)
        prompts.append(Stored(tenant, tokens, cut, seams))
    return prompts


@st.composite
def quotes(draw: st.DrawFn, prompts: list[Stored]) -> tuple[np.ndarray, list[Quote]]:
    parts, said, at = [text(0, 0)], [], 0
    for number in range(draw(st.integers(1, 3))):
        parts.append(text(draw(st.integers(1, 60)), 100 + number))
        at += len(parts[-1])
        prompt = draw(st.sampled_from(prompts))
        begins = [seam for seam in prompt.seams if seam < len(prompt.tokens)]
        start = draw(st.sampled_from(begins) if begins and draw(st.booleans()) else st.integers(0, len(prompt.tokens)))
        end = draw(st.integers(start, len(prompt.tokens)))
        said.append(Quote(prompt, start, end, at, draw(st.booleans())))
        parts.append(prompt.tokens[start:end])
        at += end - start
    return np.concatenate(parts), said


@settings(max_examples=150)
@given(st.data())
def test_exactly_what_stood_there_before_is_found(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([32, 64, 100]))
    prompts = data.draw(stored_prompts(size))
    tokens, said = data.draw(quotes(prompts))
    everything = [chunk for prompt in prompts for chunk in prompt.chunks]
    dead = {chunk.key for chunk in everything if data.draw(st.integers(0, 5)) == 0}
    asking = data.draw(st.sampled_from(TENANTS))
    min_tokens = data.draw(st.sampled_from([WINDOW, 64, 100]))

    known = KnownPassages(size, lambda key: key not in dead)
    for prompt in prompts:
        known.add_prompt(prompt.chunks, prompt.seams)
    found = known.find(tokens, asking.id, min_tokens, [quote.at for quote in said if quote.told])

    expected: dict[tuple[int, int, int], Quote] = {}
    for quote in said:
        if quote.prompt.tenant != asking:
            continue
        for first, last in quote.prompt.runs(dead):
            start, end = max(first, quote.start), min(last, quote.end)
            if end - start >= min_tokens:
                shift = quote.at - quote.start
                expected[(start + shift, end + shift, start)] = quote
    actual = {(match.start, match.end, match.old_start) for match in found}
    assert actual <= expected.keys(), "a passage ends exactly where the texts part, or chunks are gone"
    for start, end, old_start in expected.keys() - actual:
        quote = expected[(start, end, old_start)]
        assert not quote.prompt.has_anchor(old_start, old_start + end - start, dead), "it has an anchor"
        told = quote.told and quote.start in quote.prompt.seams and old_start == quote.start
        assert not (told and end - start >= 2 * WINDOW), "its beginning was known"


def test_a_repetitive_text_gives_true_matches_only() -> None:
    """With a few words only, any window stands in many places, and every place named must be one of them."""
    size = 64
    tenant = TENANTS[0]
    prompts = [np.random.default_rng(seed).integers(0, 2, 300).astype(np.uint32) for seed in range(4)]
    prompts.append(np.zeros(300, np.uint32))
    known = KnownPassages(size, lambda key: True)
    by_key = {}
    for prompt in prompts:
        cut = chunks(tenant, prompt, size)
        known.add_prompt(cut, seams=[0, 100])
        by_key.update({chunk.key: chunk for chunk in cut})
    tokens = np.concatenate([prompts[4][:150], prompts[0][20:], prompts[4], prompts[2][:200]])
    found = known.find(tokens, tenant.id, seams=[150])
    assert found
    for match in found:
        at = match.start
        for piece in match.pieces:
            theirs = by_key[piece.key].tokens[piece.offset : piece.offset + piece.end - piece.start]
            assert piece.start == at
            assert (tokens[piece.start : piece.end] == theirs).all()
            assert match.old_start + at - match.start == by_key[piece.key].start + piece.offset
            at = piece.end
        assert at == match.end
