"""Batches cut at their separators and looked up in the background, with an engine that has nothing but retrieve."""

from __future__ import annotations

import gc
import threading
import time
from itertools import chain

import pytest
import torch

from lmcache.blend.interfaces import BlendRetriever
from lmcache.blend.retriever import SPTBlendRetriever, SPTBlendRetrieverTask
from lmcache.observability import logging as our_logging
from tests.blend.v0.engines import Engine, blob_of, metadata

SPT = [9]


@pytest.fixture
def make_retriever():
    """Retrievers that are closed after the test."""
    made = []

    def make(engine, spt=SPT, fmt="vllm"):
        made.append(SPTBlendRetriever(torch.tensor(spt), engine, metadata(fmt)))
        return made[-1]

    yield make
    for retriever in made:
        retriever.close()


def request(retriever, *prompts, dtype=torch.int64):
    """A task for a batch of prompts."""
    bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(torch.int32)
    return retriever.new_request(torch.tensor(list(chain.from_iterable(prompts)), dtype=dtype), bounds)


@pytest.mark.parametrize(
    ("spt", "prompts", "asked"),
    [
        ([9], [[1, 2, 9, 3, 9, 4, 5]], [[1, 2, 9], [3, 9], [4, 5]]),
        ([9], [[1, 2, 9]], [[1, 2, 9]]),
        ([9], [[1, 2], [3, 9, 4]], [[1, 2], [3, 9], [4]]),
        ([8, 9], [[1, 8, 9, 2], [3, 8, 9]], [[1, 8, 9], [2], [3, 8, 9]]),
        ([8, 9], [[1, 8], [9, 2]], [[1, 8], [9, 2]]),
        ([7, 7], [[7, 7, 7, 1]], [[7, 7], [7], [1]]),
        ([9], [[1, 9, 1, 9]], [[1, 9], [1, 9]]),
        ([9], [[], [1]], [[1]]),
    ],
    ids=[
        "the example",
        "separator at the end",
        "several requests",
        "separator of two tokens",
        "no separator reaches over two requests",
        "overlapping separators",
        "a passage twice",
        "an empty request",
    ],
)
def test_one_retrieval_a_segment_in_order(make_retriever, spt, prompts, asked):
    engine = Engine()
    task = request(make_retriever(engine, spt), *prompts)
    assert isinstance(task, SPTBlendRetrieverTask)
    assert len(task.result(0).valid_mask) == sum(map(len, prompts))
    assert engine.asked == asked


@pytest.mark.parametrize("fmt", ["vllm", "huggingface"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_batch_with_a_miss(make_retriever, fmt, dtype):
    engine = Engine(misses=[[4, 5]], fmt=fmt)
    task = request(make_retriever(engine, fmt=fmt), [1, 2, 9, 4, 5], [3, 9], dtype=dtype)
    for layer in range(3):
        result = task.result(layer)
        assert result.valid_mask.tolist() == [1, 1, 1, 0, 0, 1, 1]
        assert result.original_positions.tolist() == [0, 1, 2, 0, 0, 0, 1]
        for plane, got in enumerate((result.k, result.v)):
            got = got if fmt == "vllm" else got.transpose(0, 1)
            assert torch.equal(got[:3], blob_of([1, 2, 9])[layer, plane])
            assert torch.equal(got[5:], blob_of([3, 9])[layer, plane])


def test_the_caller_goes_on_while_kv_is_retrieved(make_retriever):
    gate = threading.Event()
    engine = Engine(gate=gate)
    task = request(make_retriever(engine), [1, 9, 2])
    gate.set()
    assert task.result(0).valid_mask.tolist() == [1, 1, 1]
    assert threading.current_thread() not in engine.threads


def test_the_callers_buffer_may_be_used_again_at_once(make_retriever):
    gate = threading.Event()
    engine = Engine(gate=gate)
    buffer = torch.tensor([1, 9, 2])
    task = make_retriever(engine).new_request(buffer, torch.tensor([0, 3]))
    buffer.fill_(0)
    gate.set()
    task.result(0)
    assert engine.asked == [[1, 9], [2]]


def test_several_requests_may_be_under_way(make_retriever):
    gate = threading.Event()
    retriever = make_retriever(Engine(gate=gate))
    first, second = request(retriever, [1, 9]), request(retriever, [2, 3, 9])
    gate.set()
    assert torch.equal(second.result(1).k, blob_of([2, 3, 9])[1, 0])
    assert torch.equal(first.result(2).v, blob_of([1, 9])[2, 1])


def test_an_engine_that_raises_has_nothing(make_retriever, caplog, monkeypatch):
    monkeypatch.setattr(our_logging, "_last_said", {})

    class Broken:
        def retrieve(self, tokens, mask=None, return_tuple=True):
            raise RuntimeError("no engine today")

    task = request(make_retriever(Broken()), [1, 9, 2])
    for layer in range(2):
        assert task.result(layer).k is None
        assert task.result(layer).valid_mask.tolist() == [0, 0, 0]
    (record,) = caplog.records
    assert "no engine today" in str(record.exc_info[1])


# Threads


def gone(threads, patience=30.0):
    deadline = time.monotonic() + patience
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(thread.is_alive() for thread in threads)


def test_there_is_no_thread_before_the_first_request_and_one_after(make_retriever):
    before = threading.active_count()
    engine = Engine()
    retriever = make_retriever(engine)
    assert threading.active_count() == before
    for prompt in ([1, 9, 2, 9, 3], [4, 9, 5]):
        request(retriever, prompt).result(0)
    assert len(engine.threads) == 1


def test_close_ends_the_thread(make_retriever):
    engine = Engine()
    retriever = make_retriever(engine)
    request(retriever, [1, 9]).result(0)
    retriever.close()
    assert not any(thread.is_alive() for thread in engine.threads)
    retriever.close()
    with pytest.raises(RuntimeError):
        request(retriever, [1, 9])


def test_close_turns_what_has_not_begun_into_misses(make_retriever):
    gate = threading.Event()
    engine = Engine(gate=gate)
    retriever = make_retriever(engine)
    task = request(retriever, [1, 9, 2, 9, 3])
    while not engine.asked:
        time.sleep(0.001)
    threading.Timer(0.05, gate.set).start()
    retriever.close()
    assert task.result(0).valid_mask.tolist() == [1, 1, 0, 0, 0]
    assert engine.asked == [[1, 9]]


def test_a_retriever_that_is_forgotten_ends_its_thread_when_its_requests_are_done():
    gate = threading.Event()
    engine = Engine(gate=gate)
    task = request(SPTBlendRetriever(torch.tensor(SPT), engine, metadata()), [1, 9, 2])
    gc.collect()
    gate.set()
    assert task.result(0).valid_mask.tolist() == [1, 1, 1]
    assert gone(engine.threads)


# Mistakes


@pytest.mark.parametrize("bounds", [[0, 2], [0, 4], [1, 3], [0, 2, 1, 3]])
def test_a_query_start_loc_that_does_not_cover_the_tokens(make_retriever, bounds):
    engine = Engine()
    with pytest.raises(ValueError, match=r"query_start_loc=\[.*3"):
        make_retriever(engine).new_request(torch.tensor([1, 9, 2]), torch.tensor(bounds))
    assert engine.asked == []


@pytest.mark.parametrize("tokens", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)])
def test_tokens_that_are_none(make_retriever, tokens):
    with pytest.raises(ValueError, match="tokens: expected a row of integers"):
        make_retriever(Engine()).new_request(tokens, torch.tensor([0, 3]))


@pytest.mark.parametrize("spt", [[], [[9]], [9.5]])
def test_separators_that_are_none(make_retriever, spt):
    with pytest.raises(ValueError, match="separator"):
        make_retriever(Engine(), spt)


def test_an_unknown_format_is_refused_before_anything_is_retrieved(make_retriever):
    engine = Engine()
    with pytest.raises(ValueError, match="fmt='other'"):
        make_retriever(engine, fmt="other")
    assert engine.asked == []


def test_retrievers_must_say_how_they_retrieve():
    with pytest.raises(TypeError, match="new_request"):
        BlendRetriever()
