"""What the cache holds is found in any prompt, follows eviction, keeps tenants apart and outlives the process."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import CacheKey, Namespace, placed_segment_key, prefix_keys
from lmcache.segmentation.anchors import WINDOW
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages
from lmcache.segmentation.passage_catalog import FILE, PassageCatalog
from lmcache.segmentation.passage_row import PassageRow

ONE, OTHER = Namespace("model", "bfloat16", "layout"), Namespace("model", "bfloat16", "layout", cache_salt="other")


def text(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype(np.uint32)


def chunks(namespace: Namespace, tokens: np.ndarray, size: int) -> list[KnownChunk]:
    """A prompt as the engine keeps it: full chunks as exact prefixes, the end by itself."""
    keys: list[CacheKey] = list(prefix_keys(namespace, tokens, size))
    found = [KnownChunk(key, tokens[at * size : (at + 1) * size], at * size) for at, key in enumerate(keys)]
    end = len(keys) * size
    if len(tokens) - end >= WINDOW:
        found.append(KnownChunk(placed_segment_key(namespace, tokens[end:], end), tokens[end:], end))
    return found


def everything(key: CacheKey) -> bool:
    return True


def reused(known: KnownPassages, prompt: np.ndarray, start: int, end: int, **options: object) -> int:
    """How many of the tokens ``[start, end)`` of ``prompt`` are found."""
    mask = np.zeros(len(prompt), bool)
    for match in known.find(prompt, ONE.id, **options):  # type: ignore[arg-type]
        mask[match.start : match.end] = True
    return int(mask[start:end].sum())


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([64, 256]),
    before=st.integers(0, 300),
    length=st.integers(512, 1200),
    behind=st.integers(0, 40),
    shift=st.integers(0, 300),
    seed=st.integers(0, 1000),
)
def test_a_long_passage_of_any_prompt_is_found_at_nine_tenths_of_its_tokens_wherever_it_stands(
    size: int, before: int, length: int, behind: int, shift: int, seed: int
) -> None:
    passage = text(length, seed)
    known = KnownPassages(size, everything)
    known.add_prompt(chunks(ONE, np.concatenate([text(before, 1), passage, text(behind, 2)]), size))
    prompt = np.concatenate([text(shift, 3), passage, text(30, 4)])
    assert reused(known, prompt, shift, shift + length) >= 0.9 * length


@settings(max_examples=40, deadline=None)
@given(before=st.integers(0, 200), length=st.integers(2 * WINDOW, 100), seed=st.integers(0, 10_000))
def test_a_short_passage_whose_place_was_told_is_found_for_certain(before: int, length: int, seed: int) -> None:
    passage = text(length, seed)
    known = KnownPassages(128, everything)
    known.add_prompt(chunks(ONE, np.concatenate([text(before, 1), passage, text(60, 2)]), 128), seams=[before])
    prompt = np.concatenate([text(77, 3), passage])
    # The window at the end of a chunk may be cut off, and is then searched from the next chunk on.
    assert reused(known, prompt, 77, 77 + length, seams=[77]) >= length - WINDOW


def test_tenants_do_not_meet() -> None:
    known, tokens = KnownPassages(64, everything), text(640, 0)
    known.add_prompt(chunks(OTHER, tokens, 64))
    assert known.find(tokens, ONE.id) == []
    known.add_prompt(chunks(ONE, tokens, 64))
    assert {piece.key.namespace_id for match in known.find(tokens, ONE.id) for piece in match.pieces} == {ONE.id}


def test_what_was_evicted_leaves_a_hole_and_is_forgotten() -> None:
    tokens = text(640, 0)
    noted = chunks(ONE, tokens, 64)
    dead = {noted[4].key}
    known = KnownPassages(64, lambda key: key not in dead)
    known.add_prompt(noted)
    found = known.find(tokens, ONE.id)
    assert [(match.start, match.end, match.old_start) for match in found] == [(0, 256, 0), (320, 640, 320)]
    assert len(known) == len(noted) - 1
    assert known.find(tokens, ONE.id, min_tokens=300)[0].start == 320


def test_evicted_chunks_are_swept_although_nobody_asks_for_them() -> None:
    alive: set[CacheKey] = set()
    known = KnownPassages(32, alive.__contains__)
    for seed in range(40):
        noted = chunks(ONE, text(32 * 64, seed), 32)
        alive.clear()
        alive.update(chunk.key for chunk in noted)
        known.add_prompt(noted)
    assert len(known) < 2048


def test_after_a_restart_passages_are_found_again(tmp_path: Path) -> None:
    tokens = text(700, 0)
    noted = chunks(ONE, tokens, 64)
    known = KnownPassages(64, everything, PassageCatalog(tmp_path))
    known.add_prompt(noted, seams=[70])
    known.close()

    gone = {noted[2].key}
    again = KnownPassages(64, lambda key: key not in gone, PassageCatalog(tmp_path))
    assert again.loaded.wait(10)
    assert len(again) == len(noted) - 1
    assert [type(key) for key in again._index.keys()].count(type(noted[-1].key)) == 1  # noqa: SIM118
    assert reused(again, tokens, 0, 700) == 700 - 64
    again.close()
    rows = PassageCatalog(tmp_path)
    assert noted[2].key not in {row.key for row in rows.rows()}, "what the cache lost is not kept"
    rows.close()


def test_a_damaged_row_is_dropped_and_the_others_are_read(tmp_path: Path) -> None:
    catalog = PassageCatalog(tmp_path)
    noted = chunks(ONE, text(256, 0), 64)
    for chunk in noted:
        catalog.put(PassageRow(chunk.key, chunk.tokens, chunk.start, None, (0,)))
    catalog.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE passages_1 SET row = x'00ff' WHERE key = ?", (bytes(noted[1].key),))
    connection.close()
    catalog = PassageCatalog(tmp_path)
    found = list(catalog.rows())
    assert [row.key for row in found] == [noted[0].key, noted[2].key, noted[3].key]
    assert (found[1].tokens == noted[2].tokens).all()
    catalog.close()


def test_a_file_that_is_no_catalog_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to look at" * 50)
    known = KnownPassages(64, everything, PassageCatalog(tmp_path))
    known.add_prompt(chunks(ONE, text(256, 0), 64))
    known.close()
    assert (tmp_path / "passages.damaged").exists()
    catalog = PassageCatalog(tmp_path)
    assert len(list(catalog.rows())) == 4
    catalog.close()


def test_a_directory_that_cannot_be_written_costs_only_what_was_known_before(tmp_path: Path) -> None:
    known = KnownPassages(64, everything, PassageCatalog(tmp_path / "missing"))
    known.add_prompt(chunks(ONE, text(256, 0), 64))
    assert reused(known, text(256, 0), 0, 256) == 256
    known.close()


@pytest.mark.parametrize("length", [0, 1, WINDOW - 1])
def test_what_is_too_short_to_be_found_is_not_noted(length: int) -> None:
    known = KnownPassages(64, everything)
    known.add_prompt([KnownChunk(placed_segment_key(ONE, text(length, 0), 0), text(length, 0), 0)])
    assert len(known) == 0
