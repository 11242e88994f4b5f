"""Storing and retrieving a layer a step."""

from __future__ import annotations

import pytest
import torch

from tests.engine.helpers import (
    CHUNK,
    LAYERS,
    PagesConnector,
    SlowTier,
    kv_of,
    leading,
    make_metadata,
    per_layer,
    tokens_of,
)
from tests.engine.makers import is_empty


def result_of(generator):
    """What a finished generator returns."""
    with pytest.raises(StopIteration) as stop:
        next(generator)
    return stop.value.value


@pytest.fixture
def connector():
    return PagesConnector()


@pytest.fixture
def engine(connector, make_engine):
    engine = make_engine(connector=connector)
    yield engine
    engine.close()


@pytest.mark.parametrize("fmt", ["vllm", "huggingface"])
def test_tensors_layer_by_layer(fmt, make_engine):
    engine = make_engine(metadata=make_metadata(fmt=fmt))
    tokens = tokens_of(2 * CHUNK + 3)
    blob = kv_of(tokens)
    sent = blob.transpose(2, 3).contiguous() if fmt == "huggingface" else blob
    store = engine.store_layer(tokens)
    assert next(store) == 0
    for layer, kv in enumerate(per_layer(sent)):
        assert not engine.contains(tokens), "nothing is visible before the last layer"
        assert store.send(kv) == layer + 1
    assert engine.contains(tokens), "visible with the last layer"
    assert result_of(store) == 2 * CHUNK

    prompt = tokens + tokens_of(CHUNK, seed=1)
    retrieve = engine.retrieve_layer(prompt)
    token_dim = 1 if fmt == "huggingface" else 0
    for kv, expected in zip(retrieve, per_layer(sent), strict=False):
        for plane, expected_plane in zip(kv, expected, strict=True):
            assert torch.equal(plane, expected_plane.narrow(token_dim, 0, 2 * CHUNK))
    retrieve = engine.retrieve_layer(prompt)
    assert len([next(retrieve) for _ in range(LAYERS)]) == LAYERS
    assert torch.equal(result_of(retrieve), leading(2 * CHUNK, len(prompt)))
    engine.close()


def test_pages_layer_by_layer(engine, connector):
    tokens = tokens_of(3 * CHUNK)
    slots = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[: len(tokens)]
    store = engine.store_layer(tokens, slot_mapping=slots)
    assert next(store) == 0
    for layer in range(LAYERS):
        connector.pages[layer][:, slots] = kv_of(tokens)[layer]  # the forward reaches this layer only now
        assert next(store) == layer + 1
    assert result_of(store) == 3 * CHUNK

    connector.pages.fill_(-1)
    wanted = torch.arange(len(tokens)) >= CHUNK
    retrieve = engine.retrieve_layer(tokens, wanted, slot_mapping=slots)
    for layer in range(LAYERS):
        assert bool((connector.pages[layer] == -1).all())
        assert next(retrieve) == 3 * CHUNK
        assert torch.equal(connector.pages[layer][:, slots[CHUNK:]], kv_of(tokens)[layer][:, CHUNK:])
    assert bool((connector.pages[:, :, slots[:CHUNK]] == -1).all())
    assert torch.equal(result_of(retrieve), wanted)


@pytest.mark.parametrize("steps", range(LAYERS + 1))
def test_a_store_that_is_given_up_leaves_nothing(engine, steps):
    tokens = tokens_of(2 * CHUNK)
    store = engine.store_layer(tokens)
    kv = per_layer(kv_of(tokens))
    for step in range(steps):
        next(store) if step == 0 else store.send(kv[step - 1])
    store.close()
    assert not engine.contains(tokens)
    assert is_empty(engine)
    assert engine.store(tokens, kv_of(tokens)) == 2 * CHUNK, "and does not stand in the way of the next"


@pytest.mark.parametrize("steps", range(LAYERS + 1))
def test_a_retrieve_may_be_given_up(engine, steps):
    tokens = tokens_of(2 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    retrieve = engine.retrieve_layer(tokens)
    for _ in range(steps):
        next(retrieve)
    retrieve.close()  # the leak detector looks at the references


def test_nothing_found(engine):
    tokens = tokens_of(CHUNK)
    assert not result_of(engine.retrieve_layer(tokens)).any()
    assert not result_of(engine.retrieve_layer(tokens, slot_mapping=torch.arange(CHUNK))).any()


def test_all_held_already(engine):
    tokens = tokens_of(CHUNK)
    engine.store(tokens, kv_of(tokens))
    store = engine.store_layer(tokens)
    next(store)
    for kv in per_layer(kv_of(tokens) + 1):
        store.send(kv)
    assert result_of(store) == 0
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], kv_of(tokens))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "send .k, v. of layer 0"),
        ((torch.zeros(1),), "layer 0: expected a tuple of 2 tensors, got 1"),
        ((torch.zeros(1), torch.zeros(1)), r"layer 0.k: expected torch.float32 \[16, 2, 8\], got torch.float32 \[1\]"),
    ],
)
def test_a_wrong_layer_is_refused(engine, sent, message):
    store = engine.store_layer(tokens_of(CHUNK))
    next(store)
    with pytest.raises(ValueError, match=message):
        store.send(sent)
    assert is_empty(engine)


def test_pages_take_no_tensors(engine):
    tokens = tokens_of(CHUNK)
    store = engine.store_layer(tokens, slot_mapping=torch.arange(CHUNK))
    next(store)
    with pytest.raises(ValueError, match="read from the pages"):
        store.send(per_layer(kv_of(tokens))[0])


def test_with_a_lease_from_before(make_engine):
    """The scheduler takes the lease, the forward uses it a layer at a time."""
    connector = PagesConnector()
    slow = SlowTier()
    engine = make_engine([slow], connector=connector)
    tokens = tokens_of(2 * CHUNK)
    slots = torch.arange(len(tokens))
    connector.pages[:, :, slots] = kv_of(tokens)
    engine.store(tokens, slot_mapping=slots)
    make_engine.memory.clear()
    connector.pages.fill_(-1)
    with engine.prefetch(tokens, paged=True) as lease:
        slow.answer_all()
        assert lease.wait(10)
        steps = engine.retrieve_layer(tokens, slot_mapping=slots, lease=lease)
        assert len(list(steps)) == LAYERS
    assert torch.equal(connector.pages[:, :, slots], kv_of(tokens))
    engine.close()
