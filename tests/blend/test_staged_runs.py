"""The copies of a layer, in one call: what they bring is what lies in the chunks."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend import staged_layers
from lmcache.blend.batch import PlacedSpan
from lmcache.blend.chunk_source import ChunkSource, DenseChunk
from lmcache.blend.plan import ReusedSpan
from lmcache.blend.staged_layers import StagedLayers, StagingRing
from lmcache.memory.device_copy import Addresses

LAYERS, HEADS, DIM = 5, 2, 4


class Chunks(ChunkSource):
    """Parts of chunks ``[layers, 2, tokens, heads, dim]`` with their first token and their number."""

    def __init__(self, parts: list[tuple[torch.Tensor, int, int]]) -> None:
        self.parts = parts
        self.num_tokens = self.length = sum(count for _, _, count in parts)

    def dense_chunks(self) -> list[DenseChunk]:
        return [DenseChunk(chunk.data_ptr(), chunk.shape[2], first, count) for chunk, first, count in self.parts]


class Event:
    def record(self, stream: object) -> None: ...


class Stream:
    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...


@pytest.fixture(autouse=True)
def _copied_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(to: Addresses, source: Addresses, sizes: Addresses, stream: object) -> None:
        for target, origin, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, origin, size)

    monkeypatch.setattr(staged_layers, "can_copy_many", lambda device: True)
    monkeypatch.setattr(staged_layers, "copy_many", copy)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def ring(kept_bytes: int) -> StagingRing:
    made = StagingRing(torch.device("cpu"), kept_bytes)
    made.stream = Stream()  # type: ignore[assignment]
    return made


Parts = list[tuple[int, int, int]]
PARTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=4)
KEPT = st.sampled_from([0, 1 << 12, 1 << 20])


def chunks_of(parts: Parts) -> list[tuple[torch.Tensor, int, int]]:
    return [(torch.randn(LAYERS, 2, at + count + rest, HEADS, DIM), at, count) for at, count, rest in parts]


def staged_of(source: Chunks, start: int, end: int, kept: int) -> StagedLayers:
    span = ReusedSpan(0, end - start, source=0, source_start=start)
    placed = PlacedSpan(0, (0, end - start), span, source)
    return StagedLayers([placed], LAYERS, (HEADS, DIM), torch.float32, ring(kept))


@given(parts=PARTS, cut=st.tuples(st.integers(0, 5), st.integers(0, 5)), kept=KEPT)
def test_every_layer_brings_the_rows_of_the_span(parts: Parts, cut: tuple[int, int], kept: int) -> None:
    chunks = chunks_of(parts)
    source = Chunks(chunks)
    start = min(cut[0], source.num_tokens - 1)
    end = max(start + 1, source.num_tokens - cut[1])
    staged = staged_of(source, start, end, kept)
    staged.begin()
    expected = torch.cat([chunk[:, :, at : at + count] for chunk, at, count in chunks], 2)[:, :, start:end]
    for layer in range(LAYERS):
        rows = staged.layer(layer).view(-1, HEADS, DIM)
        assert torch.equal(rows[staged.k_from.long()], expected[layer, 0])
        assert torch.equal(rows[staged.v_from.long()], expected[layer, 1])
        staged.done(layer)


@given(parts=PARTS, kept=KEPT, count=st.integers(1, LAYERS), ahead=st.sampled_from([None, 0, 100, 1 << 12]))
def test_layers_that_lie_one_after_the_other_are_given_as_one(
    parts: Parts, kept: int, count: int, ahead: int | None
) -> None:
    """Also where only the first were staged at the beginning."""
    chunks = chunks_of(parts)
    source = Chunks(chunks)
    staged = staged_of(source, 0, source.num_tokens, kept)
    staged.begin(ahead)
    staged.go_on()
    expected = torch.cat([chunk[:, :, at : at + count] for chunk, at, count in chunks], 2)
    first = 0
    while first < LAYERS:
        wanted = min(count, LAYERS - first)
        together = staged.together(first, wanted)
        if together is None:
            assert wanted > 1
            wanted = 1
            together = staged.layer(first)
        for index, rows in enumerate(together.view(wanted, -1, HEADS, DIM)):
            assert torch.equal(rows[staged.k_from.long()], expected[first + index, 0])
            assert torch.equal(rows[staged.v_from.long()], expected[first + index, 1])
        staged.done(first, wanted)
        first += wanted


def test_the_first_and_the_last_layer_wait_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(staged_layers, "copy_many", lambda to, source, sizes, stream: calls.append(len(sizes)))
    source = Chunks([(torch.randn(LAYERS, 2, 6, HEADS, DIM), 0, 6)])
    staged_of(source, 0, 6, 1 << 20).begin()
    assert sum(calls) == LAYERS, "a copy a layer"
    assert calls[0] == calls[-1] == 1
    assert max(calls) > 1
