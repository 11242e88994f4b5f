"""KV that moves between an engine's pages and host memory."""

from __future__ import annotations

import pytest
import torch

from tests.engine.helpers import CHUNK, PagesConnector, kv_of, leading, tokens_of


@pytest.fixture
def connector():
    return PagesConnector()


@pytest.fixture
def engine(connector, make_engine):
    engine = make_engine(connector=connector)
    yield engine
    engine.close()


def fill(connector, tokens, slots, salt=0):
    connector.pages[:, :, slots] = kv_of(tokens, salt=salt)


def scattered(count, seed=0, slots=1024):
    return torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[:count]


def test_pages_come_back_elsewhere(engine, connector):
    tokens = tokens_of(3 * CHUNK + 4)
    stored_at, wanted_at = scattered(len(tokens)), scattered(len(tokens), seed=1)
    fill(connector, tokens, stored_at)
    assert engine.store(tokens, slot_mapping=stored_at) == 3 * CHUNK
    assert engine.lookup(tokens, paged=True) == 3 * CHUNK
    connector.pages.fill_(-1)
    found = engine.retrieve(tokens, slot_mapping=wanted_at)
    assert torch.equal(found, leading(3 * CHUNK, len(tokens)))
    assert torch.equal(connector.pages[:, :, wanted_at[: 3 * CHUNK]], kv_of(tokens)[:, :, : 3 * CHUNK])
    assert bool((connector.pages[:, :, wanted_at[3 * CHUNK :]] == -1).all()), "the tail was not stored"


@pytest.mark.parametrize("start", [1, CHUNK, CHUNK + 3, 3 * CHUNK])
def test_masked_pages_are_not_touched(engine, connector, start):
    """Whether the caller says so in the mapping or only in the mask."""
    tokens = tokens_of(3 * CHUNK)
    slots = scattered(len(tokens))
    fill(connector, tokens, slots)
    engine.store(tokens, slot_mapping=slots)
    wanted = torch.arange(len(tokens)) >= start
    for mapping in (slots, torch.where(wanted, slots, -1)):
        connector.pages.fill_(-1)
        assert torch.equal(engine.retrieve(tokens, wanted, slot_mapping=mapping), wanted)
        assert bool((connector.pages[:, :, slots[:start]] == -1).all())
        assert torch.equal(connector.pages[:, :, slots[start:]], kv_of(tokens)[:, :, start:])
    assert int(slots.min()) >= 0, "the caller's mapping is the caller's"


def test_a_save_that_begins_in_the_middle(engine, connector):
    """vLLM's prefix cache had the first chunk: its pages are not to be read, and ours need not hold it."""
    tokens = tokens_of(3 * CHUNK)
    slots = scattered(len(tokens))
    fill(connector, tokens, slots)
    new = torch.arange(len(tokens)) >= CHUNK + 1
    assert engine.store(tokens, mask=new, slot_mapping=torch.where(new, slots, -1)) == CHUNK
    assert engine.lookup(tokens, paged=True) == 0
    # The tokens before the mask are there already, so their chunks are not asked for.
    late = torch.arange(len(tokens)) >= 2 * CHUNK
    assert torch.equal(engine.retrieve(tokens, late, slot_mapping=slots), late)


def test_a_lease_for_more_than_is_wanted(engine, connector):
    """An engine computes the last token itself, so it may have no page for it although a chunk covers it."""
    tokens = tokens_of(2 * CHUNK)
    slots = scattered(len(tokens))
    fill(connector, tokens, slots)
    engine.store(tokens, slot_mapping=slots)
    connector.pages.fill_(-1)
    with engine.prefetch(tokens, paged=True) as lease:
        assert lease.num_tokens == 2 * CHUNK
        found = engine.retrieve(tokens[:-1], slot_mapping=slots[:-1], lease=lease)
    assert found.shape == (2 * CHUNK - 1,)
    assert bool(found.all())
    assert torch.equal(connector.pages[:, :, slots[:-1]], kv_of(tokens)[:, :, :-1])
    assert bool((connector.pages[:, :, slots[-1]] == -1).all())


def test_tails(connector, make_engine):
    engine = make_engine(connector=connector, save_unfull_chunk=True)
    tokens = tokens_of(CHUNK + 7)
    slots = scattered(len(tokens))
    fill(connector, tokens, slots)
    assert engine.store(tokens, slot_mapping=slots) == CHUNK + 7
    connector.pages.fill_(-1)
    assert bool(engine.retrieve(tokens, slot_mapping=slots).all())
    assert torch.equal(connector.pages[:, :, slots], kv_of(tokens))
    engine.close()


def test_pages_and_tensors_never_meet(engine, connector):
    tokens = tokens_of(CHUNK)
    slots = torch.arange(CHUNK)
    engine.store(tokens, kv_of(tokens))
    assert engine.lookup(tokens, paged=True) == 0
    fill(connector, tokens, slots, salt=1)
    assert engine.store(tokens, slot_mapping=slots) == CHUNK
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], kv_of(tokens))


def test_two_page_layouts_never_meet(engine, connector):
    tokens = tokens_of(CHUNK)
    fill(connector, tokens, torch.arange(CHUNK))
    engine.store(tokens, slot_mapping=torch.arange(CHUNK))
    engine.set_gpu_connector(PagesConnector(layout="test-pages-2"))
    assert engine.lookup(tokens, paged=True) == 0


@pytest.mark.parametrize("slots", [torch.arange(CHUNK - 1), torch.arange(CHUNK).int(), torch.arange(CHUNK)[None]])
def test_a_wrong_slot_mapping_is_refused(engine, slots):
    tokens = tokens_of(CHUNK)
    for call in (engine.store, engine.retrieve, engine.store_layer, engine.retrieve_layer):
        with pytest.raises(ValueError, match=rf"slot_mapping: expected int64 \[{CHUNK}\]"):
            call(tokens, slot_mapping=slots)


def test_a_lease_of_the_other_path_is_refused(engine):
    tokens = tokens_of(CHUNK)
    engine.store(tokens, kv_of(tokens))
    with engine.prefetch(tokens) as lease, pytest.raises(ValueError, match="lease"):
        engine.retrieve(tokens, slot_mapping=torch.arange(CHUNK), lease=lease)


def test_a_connector_that_fails_leaves_nothing_behind(engine, connector, monkeypatch):
    tokens = tokens_of(2 * CHUNK)

    def fail(*_):
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patch:
        patch.setattr(connector, "batched_from_gpu", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.store(tokens, slot_mapping=torch.arange(2 * CHUNK))
    assert engine.lookup(tokens, paged=True) == 0
    assert engine.store(tokens, slot_mapping=torch.arange(2 * CHUNK)) == 2 * CHUNK, "it may be tried again"
    with monkeypatch.context() as patch:
        patch.setattr(connector, "batched_to_gpu", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.retrieve(tokens, slot_mapping=torch.arange(2 * CHUNK))
