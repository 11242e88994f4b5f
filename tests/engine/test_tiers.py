"""Several tiers as one store, seen from the engine and from ``TieredStorage`` itself."""

from __future__ import annotations

import threading

import pytest
import torch

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.tiered import TieredStorage
from tests.engine.helpers import CHUNK, BrokenTier, SlowTier, kv_of, make_engine, tokens_of
from tests.storage.conformance import SPEC, expected_bytes, fill, make_keys


def put(storage, key, spec=SPEC):
    with storage.allocate(spec) as obj:
        fill(obj, key)
        return storage.put(key, obj)


@pytest.fixture
def slow():
    return SlowTier(hold_reads=False)


@pytest.fixture
def storage(slow):
    memory = LocalCPUTier(16 * SPEC.nbytes)
    slow.allocate = memory.allocate
    storage = TieredStorage(memory, [slow])
    yield storage
    storage.close()


def test_find_stops_at_the_first_hole(storage, slow):
    keys = make_keys(5)
    for key in (keys[0], keys[1], keys[2], keys[4]):
        put(storage, key)
    storage.memory.remove(keys[1])
    assert storage.find(keys) == [storage.memory, slow, storage.memory]
    assert storage.find(keys[3:]) == []
    assert storage.find([]) == []


def test_a_put_reaches_every_tier(storage, slow):
    (key,) = make_keys(1)
    assert put(storage, key)
    assert storage.memory.contains(key)
    assert slow.contains(key)


def test_a_slow_hit_moves_up(storage, slow):
    (key,) = make_keys(1)
    put(storage, key)
    storage.memory.clear()
    with storage.fetch(key, slow).result(0) as obj:
        assert torch.equal(obj.bytes, expected_bytes(key, SPEC.nbytes))
        assert storage.memory.contains(key)


def test_a_read_cannot_be_cancelled(storage, slow):
    """A cancelled future would drop the reference that the read puts into it."""
    (key,) = make_keys(1)
    put(storage, key)
    slow.hold_reads = True
    read = storage.fetch(key, slow)
    assert not read.cancel()
    slow.answer()
    read.result(0).ref_down()


def test_memory_as_staging_only(slow):
    memory = LocalCPUTier(16 * SPEC.nbytes)
    slow.allocate = memory.allocate
    storage = TieredStorage(memory, [slow], keep_in_memory=False)
    (key,) = make_keys(1)
    assert put(storage, key)
    assert not storage.memory.contains(key)
    assert storage.find([key]) == [slow]
    with storage.fetch(key, slow).result(0):
        assert not storage.memory.contains(key)
    assert storage.clear() == 1
    storage.close()


def test_a_tier_that_lost_an_entry_gets_it_again(storage, slow):
    """Its write queue was full, or it evicted what was hot in memory and so never read from it."""
    (key,) = make_keys(1)
    put(storage, key)
    slow.clear()
    assert storage.renew(key)
    assert slow.contains(key)
    storage.memory.clear()
    assert storage.renew(key)
    storage.clear()
    assert not storage.renew(key)


def test_clear_forgets_what_is_being_read(storage, slow):
    """After new weights were loaded, a read from before must not bring old KV back into memory."""
    (key,) = make_keys(1)
    put(storage, key)
    storage.memory.clear()
    slow.hold_reads = True
    read = storage.fetch(key, slow)
    old = slow.held[key]
    storage.clear()
    slow.held[key] = old  # the read ends well
    slow.answer()
    read.result(0).ref_down()
    assert not storage.memory.contains(key)


def test_clear_forgets_what_is_leased(storage):
    (key,) = make_keys(1)
    put(storage, key)
    with storage.memory.get(key) as obj:
        assert storage.clear() == 2
        assert storage.find([key]) == []
        assert torch.equal(obj.bytes, expected_bytes(key, SPEC.nbytes))


def test_clear_spares_pins(storage):
    pinned, other = make_keys(2)
    for key in (pinned, other):
        put(storage, key)
    assert storage.pin([pinned]) == 1
    storage.clear()
    assert storage.memory.contains(pinned)
    assert not storage.memory.contains(other)
    storage.unpin([pinned])
    storage.clear()
    assert not storage.contains(pinned)


def test_no_memory_is_no_error(storage):
    assert storage.allocate(KVSpec((1 << 30,), torch.uint8, "bytes", 1)) is None


def test_tiers_close_slowest_first():
    """What waits to be written lies in host memory."""
    order = []

    class Noting(SlowTier):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def close(self):
            order.append(self.name)

    memory = LocalCPUTier(1 << 20)
    close_memory = memory.close
    memory.close = lambda: (order.append("memory"), close_memory())
    TieredStorage(memory, [Noting("disk"), Noting("remote")]).close()
    assert order == ["remote", "disk", "memory"]


def test_a_closed_storage_misses(storage):
    (key,) = make_keys(1)
    put(storage, key)
    with storage.memory.get(key) as obj:
        storage.close()
        assert not storage.put(key, obj)
    assert storage.find([key]) == []
    assert storage.acquire(key) is None
    assert storage.allocate(SPEC) is None
    storage.close()


@pytest.mark.parametrize("local_cpu", [True, False])
def test_a_tier_that_raises_is_a_miss(tmp_path, local_cpu):
    """Against its contract, but nothing of ours may raise inside an engine's loop."""
    engine = make_engine([BrokenTier()], local_cpu=local_cpu, local_disk=tmp_path)
    tokens = tokens_of(2 * CHUNK)
    assert engine.lookup(tokens) == 0
    kept = 2 * CHUNK if local_cpu else 0
    assert engine.store(tokens, kv_of(tokens)) == kept
    assert engine.lookup(tokens) == kept
    assert int(engine.retrieve(tokens)[1].sum()) == kept
    assert engine.pin(tokens) == kept
    engine.unpin(tokens)
    engine.clear()
    assert engine.lookup(tokens) == 0
    assert any("failures" in name for name in engine.metrics.snapshot())
    engine.close()


def test_pins_hold_against_eviction():
    engine = make_engine(max_local_cpu_size=64 / 1024 / 1024)  # 64 KiB: five chunks
    tokens, longer = tokens_of(2 * CHUNK), tokens_of(2 * CHUNK) + tokens_of(CHUNK, seed=1)
    engine.store(tokens, kv_of(tokens))
    assert engine.pin(longer) == 2 * CHUNK
    assert engine.pin(tokens) == 2 * CHUNK

    def flood():
        for seed in range(2, 20):
            other = tokens_of(CHUNK, seed)
            engine.store(other, kv_of(other))

    flood()
    assert engine.contains(tokens)
    engine.unpin(longer)
    engine.unpin(longer)  # once too often: must not undo the pin of the shorter
    flood()
    assert engine.contains(tokens)
    engine.unpin(tokens)
    flood()
    assert not engine.contains(tokens)
    engine.close()


def test_a_prompt_larger_than_memory_is_kept_as_far_as_it_goes():
    engine = make_engine(max_local_cpu_size=64 / 1024 / 1024)
    tokens = tokens_of(50 * CHUNK)
    stored = engine.store(tokens, kv_of(tokens))
    assert 0 < stored < 50 * CHUNK
    assert engine.lookup(tokens) == stored
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], kv_of(tokens)[:, :, :stored])
    engine.close()


def test_two_stores_of_one_chunk_copy_it_once():
    engine = make_engine()
    tokens = tokens_of(2 * CHUNK)
    with engine._writes.prepare(_chunks(engine, tokens), engine._format.spec) as first:
        assert len(first) == 2
        assert engine.store(tokens, kv_of(tokens)) == 0, "left to whoever is storing it"
    assert engine.store(tokens, kv_of(tokens)) == 2 * CHUNK
    results = []
    threads = [threading.Thread(target=lambda: results.append(engine.store(tokens, kv_of(tokens)))) for _ in range(4)]
    engine.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 2 * CHUNK
    engine.close()


def _chunks(engine, tokens):
    from lmcache.prompt import cut

    return cut(len(tokens), engine.prefix_keys(tokens), CHUNK)


def test_events_name_the_chunks_in_order():
    engine = make_engine(enable_kv_events=True, save_unfull_chunk=True)
    tokens = tokens_of(2 * CHUNK + 3)
    engine.store(tokens[:CHUNK], kv_of(tokens[:CHUNK]))
    engine.store(tokens, kv_of(tokens))
    keys = engine.prefix_keys(tokens)
    events = engine.take_events()
    assert [event.block_hashes for event in events] == [[key.digest] for key in keys]
    assert [event.parent_block_hash for event in events] == [None, keys[0].digest, keys[1].digest]
    assert [event.token_ids for event in events] == [tokens[:CHUNK], tokens[CHUNK : 2 * CHUNK], tokens[2 * CHUNK :]]
    assert engine.take_events() == []
    engine.close()


def test_no_events_unless_asked_for():
    engine = make_engine()
    tokens = tokens_of(CHUNK)
    engine.store(tokens, kv_of(tokens))
    assert engine.take_events() == []
    engine.close()


def test_a_closed_engine_misses():
    engine = make_engine([SlowTier(hold_reads=False)])
    tokens = tokens_of(CHUNK)
    engine.store(tokens, kv_of(tokens))
    engine.close()
    assert engine.lookup(tokens) == 0
    assert engine.retrieve(tokens)[0] == ()
    assert engine.store(tokens, kv_of(tokens)) == 0
    assert engine.pin(tokens) == 0
    engine.close()
