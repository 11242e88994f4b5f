"""What a request holds while its chunks come from a slower tier."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.engine.helpers import CHUNK, SlowTier, kv_of, leading, make_engine, tokens_of


@pytest.fixture
def slow():
    return SlowTier()


@pytest.fixture
def engine(slow):
    engine = make_engine([slow])
    yield engine
    engine.close()


@pytest.fixture
def tokens(engine):
    """Four chunks, the first two in memory too, the last two only in the slow tier."""
    tokens = tokens_of(4 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    for key in engine.prefix_keys(tokens)[2:]:
        engine.storage.memory.remove(key)
    return tokens


def test_reads_start_at_once(engine, slow, tokens):
    lease = engine.prefetch(tokens)
    assert len(slow.reads) == 2
    assert not lease.ready()
    assert not lease.wait(0)
    assert lease.num_tokens == 4 * CHUNK
    assert lease.tokens_by_tier() == {"memory": 2 * CHUNK, "slow": 2 * CHUNK}
    slow.answer_all()
    assert lease.ready()
    assert lease.wait(0)
    assert torch.equal(engine.retrieve(tokens, return_tuple=False, lease=lease)[0], kv_of(tokens))
    lease.release()


def test_lookup_reads_nothing(engine, slow, tokens):
    assert engine.lookup(tokens) == 4 * CHUNK
    assert slow.reads == []


def test_reads_may_end_in_any_order(engine, slow, tokens):
    with engine.prefetch(tokens) as lease:
        slow.answer(index=1)
        assert not lease.ready()
        slow.answer()
        assert lease.ready()
        assert torch.equal(engine.retrieve(tokens, return_tuple=False, lease=lease)[0], kv_of(tokens))


def test_what_was_read_stays_in_memory(engine, slow, tokens):
    with engine.prefetch(tokens):
        slow.answer_all()
    with engine.prefetch(tokens) as lease:
        assert lease.ready()
        assert lease.tokens_by_tier() == {"memory": 4 * CHUNK}


@pytest.mark.parametrize(("failing", "left"), [([False, True], 3 * CHUNK), ([True, False], 2 * CHUNK)])
def test_a_read_that_fails_takes_what_is_behind_it_along(engine, slow, tokens, failing, left):
    with engine.prefetch(tokens) as lease:
        for fails in failing:
            slow.answer(failing=fails)
        assert lease.ready()
        assert lease.num_tokens == left
        blob, found = engine.retrieve(tokens, return_tuple=False, lease=lease)
        assert torch.equal(blob, kv_of(tokens)[:, :, :left])
        assert torch.equal(found, leading(left, len(tokens)))


def test_a_failure_is_final_before_the_other_reads_end(engine, slow, tokens):
    with engine.prefetch(tokens) as lease:
        slow.answer(failing=True)
        assert lease.ready(), "the read behind it is not waited for"
        assert lease.num_tokens == 2 * CHUNK


def test_a_lease_that_becomes_too_short_is_empty(slow):
    engine = make_engine([slow], min_retrieve_tokens=3 * CHUNK)
    tokens = tokens_of(4 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    engine.storage.memory.clear()
    with engine.prefetch(tokens) as lease:
        slow.answer()
        slow.answer()
        slow.answer(failing=True)
        assert lease.num_tokens == 0
        assert engine.retrieve(tokens, lease=lease)[0] == ()
    engine.close()


def test_cut_keeps_what_has_arrived(engine, slow, tokens):
    with engine.prefetch(tokens) as lease:
        slow.answer(index=1)  # the last chunk, of no use without the one before
        lease.cut()
        assert lease.ready()
        assert lease.num_tokens == 2 * CHUNK
        slow.answer()
        assert lease.num_tokens == 2 * CHUNK
        assert lease.tokens_by_tier() == {"memory": 2 * CHUNK}


def test_released_while_reads_are_under_way(engine, slow, tokens):
    """An aborted request: the reads end later, and nobody wants what they bring."""
    lease = engine.prefetch(tokens)
    lease.release()
    lease.release()
    assert lease.ready()
    slow.answer_all()
    assert engine.retrieve(tokens, lease=lease)[0] == ()
    # The leak detector looks at the references.


def test_leased_chunks_are_not_evicted(engine, tokens):
    key = engine.prefix_keys(tokens)[0]
    with engine.prefetch(tokens):
        for seed in range(1, 2000):
            other = tokens_of(4 * CHUNK, seed)
            engine.store(other, kv_of(other))
            if engine.storage.memory.stats().evictions > 100:
                break
        else:
            pytest.fail("nothing was ever evicted")
        assert engine.storage.memory.contains(key)


def test_retrieve_copies_chunks_as_they_arrive(engine, slow, tokens):
    """A retrieve without a lease waits for the slow tier in another thread's hands."""
    done = threading.Event()
    got = []

    def retrieve():
        got.append(engine.retrieve(tokens, return_tuple=False))
        done.set()

    thread = threading.Thread(target=retrieve)
    thread.start()
    while len(slow.reads) < 2:
        assert not done.wait(0.001)
    slow.answer()
    assert not done.wait(0.05)
    slow.answer()
    thread.join(60)
    ((blob, found),) = got
    assert torch.equal(blob, kv_of(tokens))
    assert bool(found.all())


def test_a_tier_that_never_answers_costs_a_bounded_wait(slow):
    engine = make_engine([slow], max_disk_wait_seconds=0.05)
    tokens = tokens_of(2 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    engine.storage.memory.remove(engine.prefix_keys(tokens)[1])
    blob, found = engine.retrieve(tokens, return_tuple=False)
    assert torch.equal(blob, kv_of(tokens)[:, :, :CHUNK])
    assert torch.equal(found, leading(CHUNK, 2 * CHUNK))
    steps = engine.retrieve_layer(tokens)
    assert next(steps)[0].shape[0] == CHUNK
    steps.close()
    engine.close()


def test_reused_tokens_are_counted_by_tier(engine, slow, tokens):
    slow.hold_reads = False
    engine.retrieve(tokens, torch.arange(len(tokens)) >= CHUNK)
    stats = engine.stats()
    assert stats.requested_tokens == 3 * CHUNK
    assert stats.reused_tokens == {"memory": CHUNK, "slow": 2 * CHUNK}
    assert stats.stored_tokens == 4 * CHUNK
