from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.kv_source import KVLoadError
from lmcache.blend.segment_format import SegmentFormat, SegmentHeader, context_digest
from lmcache.blend.segment_store import SegmentStore, StoredSegment
from lmcache.cache_engine import LMCacheEngine
from lmcache.keys import segment_key
from lmcache.manager import LMCacheManager
from tests.engine.helpers import make_config, make_engine, make_metadata, tokens_of

TOKENS = tokens_of(37)


def kv(num_tokens: int = 37, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ...]:
    """Two layers of different shapes, V narrower than K."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(num_tokens, heads, 8, generator=generator).to(dtype) for heads in (2, 1)]
    values = [torch.randn(num_tokens, heads, 4, generator=generator).to(dtype) for heads in (2, 1)]
    return keys, values


@pytest.fixture
def engine() -> Iterator[LMCacheEngine]:
    engine = make_engine()
    yield engine
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gives_back_the_bytes_and_where_they_came_from(engine, dtype):
    keys, values = kv(dtype=dtype)
    store, before = SegmentStore(engine), tokens_of(12, seed=5)
    assert store.get(TOKENS) is None
    assert not store.contains(TOKENS)
    assert store.put(TOKENS, keys, values, before=before, length=60)
    assert store.contains(TOKENS)
    with store.get(TOKENS) as segment:
        assert (segment.num_tokens, segment.start, segment.length, segment.tier) == (37, 12, 60, "memory")
        for layer in range(2):
            k, v = segment.layer(layer)
            assert torch.equal(k, keys[layer])
            assert torch.equal(v, values[layer])
        assert segment.follows(before)
        assert not segment.follows(before[:-1])
        assert not segment.follows(tokens_of(12, seed=6))
        with pytest.raises(KVLoadError, match="layer 2 is wanted"):
            segment.layer(2)
    with pytest.raises(KVLoadError, match="released"):
        segment.layer(0)
    segment.release()
    assert engine.stats().stored_tokens == engine.stats().reused_tokens["memory"] == 37


def test_what_was_stored_first_stays(engine):
    store = SegmentStore(engine)
    keys, values = kv()
    assert store.put(TOKENS, keys, values)
    assert store.put(TOKENS, *kv(seed=1), before=[1, 2, 3])
    with store.get(TOKENS) as segment:
        assert torch.equal(segment.layer(0)[0], keys[0])


def test_tenants_and_adapters_never_meet_and_neither_do_prefixes(engine):
    SegmentStore(engine, cache_salt="a").put(TOKENS, *kv())
    assert SegmentStore(engine, cache_salt="b").get(TOKENS) is None
    assert SegmentStore(engine, cache_salt="a", lora="x").get(TOKENS) is None
    assert engine.lookup(TOKENS, cache_salt="a") == 0
    SegmentStore(engine, cache_salt="a").get(TOKENS).release()


def test_survives_a_restart_on_disk(tmp_path: Path):
    def manager() -> LMCacheManager:
        config = make_config(local_disk=f"file://{tmp_path}", max_local_disk_size=0.05)
        return LMCacheManager(config, make_metadata())

    first = manager()
    keys, values = kv()
    assert SegmentStore(first.engine).put(TOKENS, keys, values, before=[7])
    first.close()
    second = manager()
    found = SegmentStore(second.engine).get_many([tokens_of(9, seed=8), TOKENS])
    assert found[0] is None
    assert found[1].tier == "disk"
    assert found[1].start == 1
    assert torch.equal(found[1].layer(1)[1], values[1])
    found[1].release()
    second.close()


def test_a_full_pool_is_no_error(engine):
    keys = [torch.zeros(40_000, 8, 8)] * 3
    assert not SegmentStore(engine).put(range(40_000), keys, keys)


def put_bytes(engine: LMCacheEngine, store: SegmentStore, raw: torch.Tensor) -> None:
    """Store ``raw`` in place of the bytes of TOKENS."""
    key = segment_key(store._namespace, TOKENS)
    spec = SegmentFormat.of(*kv(), start=0, length=37, before=context_digest([])).spec
    engine.storage.clear()
    with engine.storage.allocate(spec) as obj:
        obj.bytes[: len(raw)] = raw
        assert engine.storage.put(key, obj)


def stored_bytes() -> torch.Tensor:
    keys, values = kv()
    form = SegmentFormat.of(keys, values, start=0, length=37, before=context_digest([]))
    data = torch.zeros(form.spec.nbytes, dtype=torch.uint8)
    form.write(data, keys, values)
    return data


@given(st.integers(0, 160), st.integers(1, 255))
def test_a_damaged_header_is_a_miss_or_reads_within_its_bytes(at, flip):
    data = stored_bytes()
    data[at] ^= flip
    try:
        form = SegmentFormat.read(data)
    except KVLoadError:
        return
    assert form.spec.nbytes == len(data)
    for layer in range(len(form.header.layers)):
        form.layer(data, layer)


def test_a_damaged_header_is_logged_and_missed(engine, caplog):
    store = SegmentStore(engine)
    data = stored_bytes()
    data[3] ^= 1
    put_bytes(engine, store, data)
    assert store.get(TOKENS) is None
    assert engine.metrics.registry.get_sample_value("lmcache_failures_total", {"reason": "segment_header"}) == 1


@pytest.mark.parametrize("num_tokens", [0, -1, 2**40])
def test_a_header_that_lies_about_sizes_is_refused(num_tokens):
    header = SegmentHeader(num_tokens, 0, 37, context_digest([]), "float32", ((2, 8, 2, 4),))
    raw = msgspec.msgpack.encode(header)
    lead = b"lmcseg01" + len(raw).to_bytes(4, "little") + raw
    data = torch.zeros(8192, dtype=torch.uint8)
    data[: len(lead)] = torch.frombuffer(bytearray(lead), dtype=torch.uint8)
    with pytest.raises(KVLoadError):
        SegmentFormat.read(data)


def test_says_what_is_wrong(engine):
    store = SegmentStore(engine)
    keys, values = kv()
    with pytest.raises(ValueError, match="2 and 1 layers"):
        store.put(TOKENS, keys, values[:1])
    with pytest.raises(ValueError, match=r"layer 1: K is torch.float32 \[36, 1, 8\]"):
        store.put(TOKENS, [keys[0], keys[1][1:]], values)
    with pytest.raises(ValueError, match="KV of 37 tokens for a passage of 36"):
        store.put(TOKENS[1:], keys, values)
    with pytest.raises(ValueError, match="float64"):
        store.put(TOKENS, [k.double() for k in keys], [v.double() for v in values])
    with pytest.raises(KVLoadError, match="no passage of this version"):
        StoredSegment(_Bytes(torch.zeros(4096, dtype=torch.uint8)), "memory")


class _Bytes:
    def __init__(self, data: torch.Tensor) -> None:
        self.bytes = data
