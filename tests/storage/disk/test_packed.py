"""A disk tier whose chunks are packed, encrypted, or both."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

pytest.importorskip("zstandard")

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkHeader
from lmcache.storage.codecs import make_codec
from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.disk.direct_io import BLOCK
from lmcache.storage.disk.foreign import ForeignDirectory
from lmcache.storage.disk.packed import Packed, decode_stored, encode_stored
from lmcache.storage.disk.space import ENTRY_METADATA_BYTES, FIXED_BYTES, SpaceRules
from lmcache.storage.encryption import KeyRing
from lmcache.storage.interface import Allocate
from lmcache.storage.policies.lru import LRUPolicy
from tests.storage.conformance import SPEC as BIG
from tests.storage.conformance import BoundedTierConformance, TierConformance
from tests.storage.disk.helpers import SPEC, Heap, chunk_files, content, get, key_of, put, spec_of

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
BY_OLD, BY_BOTH, BY_NEW = KeyRing({"1": OLD}), KeyRing({"2": NEW, "1": OLD}), KeyRing({"2": NEW})
FORMATS = [
    pytest.param(codec, keys, id=f"{codec}{'-encrypted' if keys else ''}")
    for codec, keys in (("raw", BY_OLD), ("zstd", None), ("zstd", BY_OLD))
]
CAPACITY = 64 << 20


def conforming(tmp_path: Path, capacity_bytes: int, allocate: Allocate, chunk_format: ChunkFormat) -> LocalDiskTier:
    options = DiskSettings(tmp_path / "kv", FIXED_BYTES + capacity_bytes)
    return LocalDiskTier(options, allocate, LRUPolicy(), chunk_format)


class TestEncrypted(BoundedTierConformance):
    # The tag takes a block more.
    entry_overhead = SpaceRules(Path("/"), FIXED_BYTES).charge(BIG.nbytes + BLOCK) + ENTRY_METADATA_BYTES - BIG.nbytes

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> LocalDiskTier:
        return conforming(tmp_path, capacity_bytes, allocate, ChunkFormat(keys=BY_BOTH))


class TestPacked(TierConformance):
    """How many fit depends on their bytes."""

    keys: ClassVar[KeyRing | None] = None
    entry_overhead = TestEncrypted.entry_overhead

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> LocalDiskTier:
        return conforming(tmp_path, capacity_bytes, allocate, ChunkFormat(make_codec("zstd"), self.keys))


class TestPackedAndEncrypted(TestPacked):
    keys = BY_BOTH


def open_with(directory: Path, heap: Heap, codec: str = "raw", keys: KeyRing | None = None) -> LocalDiskTier:
    options = DiskSettings(directory, CAPACITY)
    return LocalDiskTier(options, heap.allocate, LRUPolicy(), ChunkFormat(make_codec(codec), keys))


def zeros(tier: LocalDiskTier, heap: Heap, number: int, spec: KVSpec = SPEC) -> None:
    with heap.allocate(spec) as obj:
        obj.bytes.zero_()
        assert tier.submit_put(key_of(number), obj)


@pytest.mark.parametrize(("codec", "keys"), FORMATS)
def test_it_is_there_again_after_a_restart(tmp_path: Path, heap: Heap, codec: str, keys: KeyRing | None) -> None:
    tier = open_with(tmp_path, heap, codec, keys)
    assert put(tier, heap, key_of(1))
    zeros(tier, heap, 2)
    assert tier.flush(60)
    used = tier.stats().used_bytes
    tier.close()
    if keys is not None:
        assert not any(content(key_of(1), SPEC.nbytes)[:64] in path.read_bytes() for path in chunk_files(tmp_path))
    tier = open_with(tmp_path, heap, codec, keys)
    assert tier.stats().used_bytes == used
    assert get(tier, key_of(1)) == content(key_of(1), SPEC.nbytes)
    assert get(tier, key_of(2)) == bytes(SPEC.nbytes)
    assert tier.stats().failures == {}
    tier.close()


def test_room_that_was_not_needed_is_given_back(tmp_path: Path, heap: Heap) -> None:
    spec = spec_of(1 << 20)
    raw, small = open_with(tmp_path / "raw", heap), open_with(tmp_path / "zstd", heap, "zstd", BY_OLD)
    for tier in (raw, small):
        for number in range(8):
            zeros(tier, heap, number, spec)
        assert tier.flush(60)
    assert small.stats().used_bytes < raw.stats().used_bytes / 20
    assert small.clear() == 8
    assert small.flush(60)
    assert small.stats().used_bytes == 0
    raw.close()
    small.close()


def test_exact_chunks_are_read_whatever_the_codec_is_now(tmp_path: Path, heap: Heap) -> None:
    for number, codec in enumerate(["raw", "zstd", "raw"]):
        tier = open_with(tmp_path, heap, codec)
        zeros(tier, heap, number)
        assert tier.flush(60)
        for earlier in range(number + 1):
            assert get(tier, key_of(earlier)) == bytes(SPEC.nbytes)
        tier.close()


def test_keys_are_changed_one_after_the_other(tmp_path: Path, heap: Heap) -> None:
    for number, keys in enumerate([BY_OLD, BY_BOTH]):
        tier = open_with(tmp_path, heap, keys=keys)
        assert put(tier, heap, key_of(number))
        assert tier.flush(60)
        assert all(get(tier, key_of(each)) is not None for each in range(number + 1))
        tier.close()
    tier = open_with(tmp_path, heap, keys=BY_NEW)
    assert get(tier, key_of(1)) is not None
    assert not tier.contains(key_of(0))
    tier.close()


@pytest.mark.parametrize("keys", [None, BY_NEW])
def test_what_there_is_no_key_for_is_kept_until_it_is_put_anew(
    tmp_path: Path, heap: Heap, keys: KeyRing | None
) -> None:
    tier = open_with(tmp_path, heap, keys=BY_OLD)
    assert all(put(tier, heap, key_of(number)) for number in (1, 2))
    assert tier.flush(60)
    tier.close()
    tier = open_with(tmp_path, heap, keys=keys)
    assert tier.stats().failures == {"start_no_key": 2}
    assert get(tier, key_of(1)) is None
    assert not tier.pin(key_of(1))
    assert tier.keys() == []
    assert put(tier, heap, key_of(1))
    assert tier.flush(60)
    assert get(tier, key_of(1)) is not None
    tier.close()
    tier = open_with(tmp_path, heap, keys=BY_OLD)  # somebody had forgotten the key
    assert get(tier, key_of(2)) is not None
    tier.close()


@pytest.mark.parametrize("keys", [None, BY_BOTH, BY_NEW])
def test_the_directory_of_another_rank(tmp_path: Path, heap: Heap, keys: KeyRing | None) -> None:
    tier = open_with(tmp_path, heap, "zstd", BY_OLD)
    zeros(tier, heap, 1)
    tier.close()
    foreign = ForeignDirectory(tmp_path, heap.allocate, 1, ChunkFormat(keys=keys))
    obj = foreign.submit_get(key_of(1)).result(60)
    assert (obj is not None) == foreign.contains(key_of(1)) == (keys is BY_BOTH)
    if obj is not None:
        obj.ref_down()
    foreign.close()
    assert len(chunk_files(tmp_path)) == 1


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_what_lies_there_in_the_clear_is_removed(tmp_path: Path, heap: Heap, codec: str) -> None:
    tier = open_with(tmp_path, heap, codec)
    zeros(tier, heap, 1)
    assert tier.flush(60)
    tier.close()
    tier = open_with(tmp_path, heap, codec, BY_OLD)
    assert not tier.contains(key_of(1))
    assert chunk_files(tmp_path) == []
    tier.close()


def test_another_key_of_the_same_name_is_a_miss(tmp_path: Path, heap: Heap) -> None:
    tier = open_with(tmp_path, heap, keys=BY_OLD)
    assert put(tier, heap, key_of(1))
    tier.close()
    tier = open_with(tmp_path, heap, keys=KeyRing({"1": NEW}))
    assert get(tier, key_of(1)) is None
    assert tier.stats().failures == {"read_tampered": 1}
    assert tier.flush(60)
    assert chunk_files(tmp_path) == []
    tier.close()


def test_who_has_no_key_cannot_change_a_chunk(tmp_path: Path, heap: Heap) -> None:
    """The checksums are made right."""
    tier = open_with(tmp_path, heap, keys=BY_OLD)
    assert put(tier, heap, key_of(1))
    assert tier.flush(60)
    (path,) = chunk_files(tmp_path)
    file = bytearray(path.read_bytes())
    header = ChunkHeader.decode(bytes(file[:HEADER_BYTES]))
    file[HEADER_BYTES + 7] ^= 1
    body = file[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
    file[:HEADER_BYTES] = replace(header, checksum=xxh3_128_digest(body)).encode()
    path.write_bytes(file)
    assert get(tier, key_of(1)) is None
    assert not tier.contains(key_of(1))
    assert tier.stats().failures == {"read_tampered": 1}
    tier.close()


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 6 * BLOCK), bit=st.integers(0, 7), cut=st.booleans(), packs=st.sampled_from(["raw", "zstd"]))
def test_damage_is_a_miss_and_never_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int, cut: bool, packs: str
) -> None:
    directory, heap = tmp_path_factory.mktemp("kv"), Heap()
    tier = open_with(directory, heap, packs, BY_OLD)
    assert put(tier, heap, key_of(1))
    assert tier.flush(60)
    (path,) = chunk_files(directory)
    file = bytearray(path.read_bytes())
    if cut:
        del file[at % len(file) :]
    else:
        file[at % len(file)] ^= 1 << bit
    path.write_bytes(file)
    found = get(tier, key_of(1))
    assert found is None or found == content(key_of(1), SPEC.nbytes)  # the padding vouches for nothing
    assert (found is None) == (not tier.contains(key_of(1)))
    tier.close()
    assert heap.live == 0


@given(blocks=st.integers(1, 1 << 20), key_id=st.text(max_size=64))
def test_rows_of_the_index_come_back(blocks: int, key_id: str) -> None:
    packed = Packed(blocks * BLOCK, key_id)
    assert decode_stored(encode_stored(SPEC, packed)) == (SPEC, packed)
    assert decode_stored(encode_stored(SPEC, None)) == (SPEC, None)


@given(st.binary(max_size=200))
def test_noise_is_no_row(noise: bytes) -> None:
    for raw in (noise, b'{"spec":' + noise):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
            decode_stored(raw)


def test_sealed_noise_has_no_pattern(tmp_path: Path, heap: Heap) -> None:
    tier = open_with(tmp_path, heap, keys=BY_OLD)
    for number in (1, 2):
        zeros(tier, heap, number)
    assert tier.flush(60)
    first, second = (path.read_bytes()[HEADER_BYTES:] for path in chunk_files(tmp_path))
    assert first != second
    tier.close()
    assert os.path.getsize(chunk_files(tmp_path)[0]) == HEADER_BYTES + 3 * BLOCK
