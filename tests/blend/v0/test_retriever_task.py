"""What retrievals of segments become: one layer of the whole batch."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lmcache.blend.interfaces import BlendRetrieverResult, BlendRetrieverTask
from lmcache.blend.retriever import SPTBlendRetrieverTask
from lmcache.observability import logging as our_logging
from tests.blend.v0.engines import DIM, HEADS, LAYERS, TOKEN_DIM, blob_of, done, hit, leading_mask


@pytest.fixture(autouse=True)
def nothing_was_logged_before(monkeypatch):
    monkeypatch.setattr(our_logging, "_last_said", {})


def task_of(segments, tasks, fmt="vllm"):
    return SPTBlendRetrieverTask([torch.tensor(segment) for segment in segments], tasks, fmt)


def token_major(plane, fmt):
    return plane if fmt == "vllm" else plane.transpose(0, 1)


def assert_result(result, segments, counts, layer, fmt="vllm"):
    """The first ``counts[i]`` tokens of segment ``i`` are there, nothing else is valid."""
    assert isinstance(result, BlendRetrieverResult)
    length = sum(map(len, segments))
    shape = (length, HEADS, DIM) if fmt == "vllm" else (HEADS, length, DIM)
    assert result.k.shape == result.v.shape == shape
    valid, positions, start = [], [], 0
    for segment, count in zip(segments, counts, strict=True):
        valid += [1] * count + [0] * (len(segment) - count)
        positions += [*range(count)] + [0] * (len(segment) - count)
        expected = blob_of(segment[:count])[layer]
        for got, plane in ((result.k, expected[0]), (result.v, expected[1])):
            assert torch.equal(token_major(got, fmt)[start : start + count], plane)
        start += len(segment)
    assert result.valid_mask.tolist() == valid
    assert result.original_positions.tolist() == positions
    assert result.valid_mask.dtype == result.original_positions.dtype == torch.int32
    assert result.valid_mask.device.type == "cpu"
    assert result.original_positions.device == result.k.device


SEGMENTS = [[5, 6, 7], [8, 9], [3, 1, 4, 1]]


@pytest.mark.parametrize("fmt", TOKEN_DIM)
@pytest.mark.parametrize(
    "counts",
    [[3, 2, 4], [1, 2, 3], [3, 0, 4], [0, 0, 1], [0, 2, 0]],
    ids=["full", "partial", "a miss", "the first misses", "holes"],
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_hits_partial_hits_and_misses(fmt, counts, layer):
    tasks = [hit(segment, count, fmt) for segment, count in zip(SEGMENTS, counts, strict=True)]
    assert_result(task_of(SEGMENTS, tasks, fmt).result(layer), SEGMENTS, counts, layer, fmt)


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(list(TOKEN_DIM)),
    st.data(),
)
def test_any_segments_and_any_hits(segments, fmt, data):
    counts = [data.draw(st.integers(0, len(segment))) for segment in segments]
    task = task_of(segments, [hit(*pair, fmt) for pair in zip(segments, counts, strict=True)], fmt)
    if any(counts):
        assert_result(task.result(1), segments, counts, 1, fmt)
    else:
        assert task.result(1).k is None


def test_when_nothing_is_found_there_is_no_kv_but_the_vectors_are_there():
    result = task_of(SEGMENTS, [hit(segment, 0) for segment in SEGMENTS]).result(17)
    assert result.k is None
    assert result.v is None
    assert result.valid_mask.tolist() == result.original_positions.tolist() == [0] * 9
    assert result.valid_mask.dtype == result.original_positions.dtype == torch.int32


def test_a_batch_without_segments():
    result = task_of([], []).result(0)
    assert result.k is None
    assert result.valid_mask.shape == result.original_positions.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype(dtype):
    task = task_of(SEGMENTS[:1], [hit(SEGMENTS[0], 2, mask_dtype=dtype)])
    assert_result(task.result(0), SEGMENTS[:1], [2], 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_blobs_is_kept(dtype):
    result = task_of([[1, 2]], [hit([1, 2], dtype=dtype)]).result(0)
    assert result.k.dtype == result.v.dtype == dtype


def test_layers_may_be_asked_for_in_any_order_and_again():
    task = task_of(SEGMENTS, [hit(segment) for segment in SEGMENTS])
    for layer in (2, 0, 2, 1):
        assert_result(task.result(layer), SEGMENTS, [3, 2, 4], layer)


@pytest.mark.parametrize("count", [1, 2])
def test_the_result_is_the_callers_own(count):
    retrieval = hit([1, 2], count)
    task = task_of([[1, 2]], [retrieval])
    first = task.result(0)
    for tensor in (first.k, first.v, first.valid_mask, first.original_positions):
        tensor.fill_(77)
    assert_result(task.result(0), [[1, 2]], [count], 0)
    assert torch.equal(retrieval.result()[0], blob_of([1, 2][:count]))


def test_what_was_not_found_holds_nobodys_data():
    result = task_of([[1, 2], [3]], [hit([1, 2], 1), hit([3], 0)]).result(0)
    assert not result.k[1:].any()
    assert not result.v[1:].any()


def test_result_waits_for_every_segment():
    late: Future = Future()
    task = task_of([[1], [2]], [hit([1]), late])
    got = []
    thread = threading.Thread(target=lambda: got.append(task.result(0)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    late.set_result(hit([2]).result())
    thread.join(30)
    assert_result(got[0], [[1], [2]], [1, 1], 0)


def cancelled():
    future = Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


FAILURES = {
    "raised": lambda: done(OSError("the disk is gone")),
    "cancelled": cancelled,
    "no pair": lambda: done(None),
    "mask too short": lambda: done((blob_of([1, 2]), leading_mask(2, 2))),
    "mask of two dimensions": lambda: done((blob_of([1, 2, 3]), torch.ones(1, 3))),
    "no mask": lambda: done((blob_of([1, 2, 3]), None)),
    "mask with a gap": lambda: done((blob_of([1, 2]), torch.tensor([True, False, True]))),
    "mask without the first": lambda: done((blob_of([1, 2]), torch.tensor([False, True, True]))),
    "found, but no blob": lambda: done(((), leading_mask(3, 3))),
    "layers, not a blob": lambda: done((tuple(blob_of([1, 2, 3])), leading_mask(3, 3))),
    "blob of four dimensions": lambda: done((blob_of([1, 2, 3])[0], leading_mask(3, 3))),
    "blob longer than the mask": lambda: done((blob_of([1, 2, 3]), leading_mask(2, 3))),
    "blob of another format": lambda: done((blob_of([1, 2, 3], "huggingface"), leading_mask(3, 3))),
    "blob of another model": lambda: done((blob_of([1, 2, 3])[1:], leading_mask(3, 3))),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_retrieval_is_a_miss_of_its_segment_with_one_warning(failure, caplog):
    segments = [[7, 8], [1, 2, 3], [9]]
    task = task_of(segments, [hit(segments[0]), FAILURES[failure](), hit(segments[2])])
    for layer in range(LAYERS):
        assert_result(task.result(layer), segments, [2, 0, 1], layer)
    (record,) = caplog.records
    assert "3 tokens" in record.getMessage()
    assert record.exc_info is not None


def test_all_retrievals_failed(caplog):
    assert task_of([[1, 2, 3]], [done(OSError())]).result(0).k is None
    assert len(caplog.records) == 1


def test_a_miss_may_come_with_anything_in_place_of_kv():
    for nothing in ((), None, [], torch.empty(0), blob_of([1, 2, 3])[:, :, :0]):
        assert task_of([[1, 2, 3]], [done((nothing, leading_mask(0, 3)))]).result(0).k is None


@pytest.mark.parametrize("fmt", ["", "VLLM", "sglang"])
def test_unknown_formats(fmt):
    with pytest.raises(ValueError, match=f"fmt='{fmt}'.*'vllm', 'huggingface'"):
        task_of([[1]], [hit([1])], fmt)


def test_another_number_of_tasks_than_of_segments():
    with pytest.raises(ValueError, match="2 segments and 1 tasks"):
        task_of([[1], [2]], [hit([1])])


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_that_are_not_there(layer):
    with pytest.raises(ValueError, match=rf"layer_id={layer}: .*{LAYERS} layers"):
        task_of([[1]], [hit([1])]).result(layer)
    with pytest.raises(ValueError, match="layer_id=-1"):
        task_of([[1]], [hit([1], 0)]).result(-1)


def test_mla_is_refused_in_words():
    task = task_of([[1, 2]], [done((blob_of([1, 2])[:, :1], leading_mask(2, 2)))])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\[3, 1, 2, 2, 4\].*MLA"):
            task.result(0)


def test_tasks_must_say_what_they_found():
    with pytest.raises(TypeError, match="result"):
        BlendRetrieverTask()
