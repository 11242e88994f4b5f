from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.segmentation.anchor_table import AnchorTable
from lmcache.segmentation.anchors import DENSITY, WINDOW, anchors, anchors_of_each
from lmcache.segmentation.new_chunk import NewChunk
from lmcache.segmentation.passage_index import PassageIndex, PassageMatch

CHUNK = 64
VOCAB = 50_000


def text(count: int, seed: int, vocabulary: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.uint32)


def add_prompt(index: PassageIndex, name: str, tokens: np.ndarray, chunk: int = CHUNK) -> None:
    before = None
    for number in range(len(tokens) // chunk):
        key = (name, number)
        index.add([NewChunk(key, tokens[number * chunk : (number + 1) * chunk], number * chunk, before)])
        before = key


def check(match: PassageMatch, prompts: dict[str, np.ndarray], tokens: np.ndarray, chunk: int = CHUNK) -> None:
    """Every token of a match is the token that its piece says, and the pieces follow each other."""
    assert match.pieces[0].start == match.start
    assert match.pieces[-1].end == match.end
    old = match.old_start
    for piece, following in zip(match.pieces, [*match.pieces[1:], None], strict=True):
        name, number = piece.key
        at = number * chunk + piece.offset
        assert at == old
        assert piece.offset + piece.end - piece.start <= chunk
        assert (tokens[piece.start : piece.end] == prompts[name][at : at + piece.end - piece.start]).all()
        assert following is None or following.start == piece.end
        old += piece.end - piece.start


@settings(max_examples=60)
@given(st.data())
def test_a_passage_is_found_wherever_it_stands_and_however_it_was_cut(data):
    index = PassageIndex(CHUNK)
    prompts = {f"p{number}": text(data.draw(st.integers(0, 900)), number) for number in range(3)}
    for name, tokens in prompts.items():
        add_prompt(index, name, tokens)
    parts, wanted, at = [], [], 0
    for number in range(data.draw(st.integers(1, 4))):
        parts.append(text(data.draw(st.integers(0, 100)), 100 + number))
        at += len(parts[-1])
        name = data.draw(st.sampled_from(sorted(prompts)))
        kept = len(prompts[name]) // CHUNK * CHUNK  # a last chunk that is not full is not kept
        if kept >= 512:
            start = data.draw(st.integers(0, kept - 512))
            length = data.draw(st.integers(512, kept - start))
            parts.append(prompts[name][start : start + length])
            wanted.append((at, at + length))
            at += length
    tokens = np.concatenate(parts) if parts else text(0, 0)
    matches = index.find(tokens)
    for match in matches:
        check(match, prompts, tokens)
    covered = np.zeros(len(tokens), bool)
    for match in matches:
        covered[match.start : match.end] = True
    for start, end in wanted:
        assert covered[start:end].mean() >= 0.9


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_texts_that_repeat_themselves_give_only_true_matches(seed, vocabulary):
    """With a few words only, the same windows stand everywhere."""
    index = PassageIndex(CHUNK)
    prompts = {name: text(300, seed + number, vocabulary) for number, name in enumerate("ab")}
    prompts["c"] = np.tile(text(7, seed, vocabulary), 60)
    for name, tokens in prompts.items():
        add_prompt(index, name, tokens)
    tokens = np.concatenate([prompts["c"][3:200], prompts["a"][10:290], prompts["b"][:150]])
    for match in index.find(tokens):
        check(match, prompts, tokens)


def test_short_runs_are_left_out():
    index = PassageIndex(CHUNK)
    stored = text(640, 1)
    add_prompt(index, "p", stored)
    tokens = np.concatenate([text(50, 2), stored[100:300], text(50, 3)])
    assert [(m.start, m.end, m.old_start) for m in index.find(tokens)] == [(50, 250, 100)]
    assert index.find(tokens, min_tokens=201) == []
    assert index.find(tokens[:20]) == []
    assert index.find(tokens[:0]) == []


def test_a_match_goes_on_in_the_chunk_that_fits_best():
    """Three prompts begin alike: behind the border of a chunk, the one is followed that goes on as the new one does."""
    index = PassageIndex(CHUNK)
    shared = next(tokens for seed in range(100) if len(anchors(tokens := text(CHUNK, seed))[0]))
    prompts = {name: np.concatenate([shared, text(CHUNK, 200 + number)]) for number, name in enumerate("abc")}
    for name, tokens in prompts.items():
        # The first chunk of all three is one chunk.
        index.add([NewChunk("shared", shared, 0)])
        index.add([NewChunk((name, 1), tokens[CHUNK:], CHUNK, "shared")])
    tokens = prompts["b"][: CHUNK + 40]
    (match,) = index.find(tokens)
    assert [(piece.key, piece.start, piece.end) for piece in match.pieces] == [
        ("shared", 0, CHUNK),
        (("b", 1), CHUNK, CHUNK + 40),
    ]


def test_what_is_discarded_is_not_found_and_its_place_is_taken_again():
    index = PassageIndex(CHUNK)
    prompts = {name: text(640, number) for number, name in enumerate("abc")}
    add_prompt(index, "a", prompts["a"])
    add_prompt(index, "b", prompts["b"])
    for number in range(10):
        index.discard(("a", number))
    index.discard("never seen")
    assert len(index) == 10
    assert index.find(prompts["a"]) == []
    add_prompt(index, "c", prompts["c"])
    assert index.find(prompts["a"]) == []
    for name in "bc":
        (match,) = index.find(prompts[name])
        assert (match.start, match.end) == (0, 640)
        check(match, prompts, prompts[name])


def test_a_hole_in_the_middle_of_a_passage_leaves_both_sides():
    index = PassageIndex(CHUNK)
    stored = text(640, 1)
    add_prompt(index, "p", stored)
    index.discard(("p", 4))
    found = [(m.start, m.end) for m in index.find(stored)]
    assert found == [(0, 256), (320, 640)]


def test_readers_and_writers_at_the_same_time():
    index = PassageIndex(CHUNK)
    stored = text(640, 1)
    add_prompt(index, "kept", stored)
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(number: int) -> None:
        for turn in range(30):
            name = f"w{number}-{turn}"
            add_prompt(index, name, text(640, 1000 * number + turn + 2))
            for chunk in range(10):
                index.discard((name, chunk))

    def read() -> None:
        try:
            while not stop.is_set():
                (match,) = index.find(stored)
                assert (match.start, match.end) == (0, 640)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert len(index) == 10


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 1000))
def test_anchors_depend_on_their_window_alone(before, after, seed):
    middle = text(200, seed)
    whole = np.concatenate([text(before, seed + 1), middle, text(after, seed + 2)])
    at, hashes = anchors(middle)
    there, all_hashes = anchors(whole)
    inside = (there >= before) & (there + WINDOW <= before + len(middle))
    assert (there[inside] - before).tolist() == at.tolist()
    assert all_hashes[inside].tolist() == hashes.tolist()


rows_with_seams = st.tuples(st.integers(WINDOW, 200), st.lists(st.integers(-1, 210), max_size=4))


@given(st.lists(rows_with_seams, min_size=1, max_size=6), st.integers(0, 1000))
def test_the_anchors_of_many_rows_are_those_of_each(rows, seed):
    # Of a small vocabulary, so that some have many.
    texts = [text(length, seed + number, 2) for number, (length, _) in enumerate(rows)]
    seams = [also for _, also in rows]
    of, at, hashes = anchors_of_each(texts, seams)
    for number, (tokens, also) in enumerate(zip(texts, seams, strict=True)):
        alone_at, alone_hashes = anchors(tokens, also)
        assert at[of == number].tolist() == alone_at.tolist()
        assert hashes[of == number].tolist() == alone_hashes.tolist()


@pytest.mark.parametrize("share", [0, 3])
def test_chunks_that_are_noted_together_are_found_as_those_that_come_one_by_one(share):
    tokens = text(150 * CHUNK, 0)
    chunks = [
        NewChunk(number, tokens[number * CHUNK : (number + 1) * CHUNK], number * CHUNK, number - 1 if number else None)
        for number in range(150)
    ]
    single, together = PassageIndex(CHUNK), PassageIndex(CHUNK)
    known = chunks[:: share or 1000]
    for chunk in [*known, *chunks]:
        single.add([chunk])
    together.add(known)
    assert together.add([*chunks, chunks[-1]]) == [chunk for chunk in chunks if chunk not in known]
    prompt = np.concatenate([text(50, 1), tokens[100:5000], text(50, 2), tokens[6000:]])
    assert together.find(prompt) == single.find(prompt)


def test_a_text_that_is_all_anchors_finds_room():
    vocabulary = next(
        token for token in range(1000) if len(anchors(np.full(WINDOW, token, np.uint32))[0])
    )  # every window of it is an anchor
    tokens = np.full(64 * 256, vocabulary, np.uint32)
    index: PassageIndex[int] = PassageIndex(256)
    index.add([NewChunk(number, row, number * 256) for number, row in enumerate(tokens.reshape(64, 256))])
    mixed = text(64 * 256, 3)
    index.add([NewChunk(100 + number, row, number * 256) for number, row in enumerate(mixed.reshape(64, 256))])
    assert [match.end - match.start for match in index.find(mixed[:256])] == [256]


def test_about_one_window_in_so_many_is_an_anchor():
    at, hashes = anchors(text(200_000, 0))
    assert len(at) == pytest.approx(200_000 / DENSITY, rel=0.05)
    assert len(np.unique(hashes)) == len(hashes)


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000)), max_size=30), max_size=6))
def test_the_table_remembers_the_last_place_of_every_hash(calls):
    table, model = AnchorTable(256), {}
    for call in calls:
        # Few homes, so that probing is exercised.
        hashes = np.array([(h % 5) << 8 | (h << 40) for h, _ in call], np.uint64)
        table.put(hashes, np.array([place for _, place in call], np.int64))
        model.update(zip(hashes.tolist(), (place for _, place in call), strict=True))
    assert len(table) == len(model)
    known = np.array([*model, 12345 << 50], np.uint64)
    assert table.get(known).tolist() == [*model.values(), -1]
    even = table.successor(lambda places: places % 2 == 0, 0)
    assert even.get(known).tolist() == [*(place if place % 2 == 0 else -1 for place in model.values()), -1]


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="chunk_size=31"):
        PassageIndex(31)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        PassageIndex(64).add([NewChunk("key", text(65, 0), 0)])


def test_an_index_that_holds_little_takes_little_memory():
    tracemalloc.start()
    try:
        index = PassageIndex(256)
        add_prompt(index, "p", text(512, 1), 256)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
