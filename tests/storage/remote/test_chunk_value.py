"""Chunks as values: packed, encrypted, by servers that are set up alike or not."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

pytest.importorskip("zstandard")

from lmcache.keys import CacheKey
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkHeader, Packing
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.encryption import KeyRing
from lmcache.storage.remote.chunk_receiver import ChunkReceiver
from tests.storage.conformance import make_keys

SPEC = KVSpec((3, 2, 32, 2, 16), torch.bfloat16, TOKEN_MAJOR, 32)
KEY, OTHER = make_keys(2)
OLD, NEW = os.urandom(32), os.urandom(32)


@pytest.fixture(scope="module")
def pool() -> Iterator[SlabAllocator]:
    pool = SlabAllocator(16 << 20)
    yield pool
    pool.close()


def numbers(seed: int = 0) -> torch.Tensor:
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(seed)).cumsum(2).to(SPEC.dtype)


def written(format_: ChunkFormat, pool: SlabAllocator, key: CacheKey = KEY) -> bytes:
    obj = pool.allocate(SPEC)
    assert obj is not None
    with obj:
        obj.tensor.copy_(numbers())
        return b"".join(format_.encode(key, obj))


def read(format_: ChunkFormat, value: bytes, pool: SlabAllocator, key: CacheKey = KEY) -> torch.Tensor | str:
    """The chunk, or why there is none."""
    receiver = ChunkReceiver(format_, key, pool.allocate)
    memory = receiver.begin(len(value), memoryview(value[:HEADER_BYTES]))
    if memory is not None:
        assert memory.nbytes == len(value) - HEADER_BYTES
        memory[:] = value[HEADER_BYTES:]
        receiver.finish()
    obj: MemoryObj | None = receiver.take()
    if obj is None:
        assert receiver.failure is not None
        return receiver.failure
    with obj:
        return obj.tensor.clone()


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_every_format_reads_what_it_wrote(codec: str, encrypted: bool, pool: SlabAllocator) -> None:
    format_ = ChunkFormat(make_codec(codec), KeyRing({"a": NEW}) if encrypted else None)
    value = written(format_, pool)
    back = read(format_, value, pool)
    assert isinstance(back, torch.Tensor)
    assert torch.allclose(back.float(), numbers().float(), rtol=0.07, atol=numbers().abs().max().item() / 15)
    assert torch.equal(back, numbers()) == make_codec(codec).is_exact
    assert (numbers().view(torch.uint8).numpy().tobytes()[:64] in value) == (codec == "raw" and not encrypted)


def test_without_codec_and_key_a_value_is_the_format_of_old(pool: SlabAllocator) -> None:
    assert int.from_bytes(written(ChunkFormat(), pool)[8:10], "little") == 1
    assert int.from_bytes(written(ChunkFormat(make_codec("zstd")), pool)[8:10], "little") == 2


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_exact_chunks_are_read_however_packed(codec: str, pool: SlabAllocator) -> None:
    value = written(ChunkFormat(make_codec(codec)), pool)
    for other in CODEC_NAMES:
        back = read(ChunkFormat(make_codec(other)), value, pool)
        assert isinstance(back, torch.Tensor)
        assert torch.equal(back, numbers())


@pytest.mark.parametrize("codec", ["fp8", "delta"])
def test_what_is_not_exact_never_meets_who_expects_it_to_be(codec: str, pool: SlabAllocator) -> None:
    lossy = ChunkFormat(make_codec(codec))
    assert lossy.tag
    assert not ChunkFormat(make_codec("zstd")).tag
    value = written(lossy, pool)
    for other in CODEC_NAMES:
        if other != codec:
            assert read(ChunkFormat(make_codec(other)), value, pool) == "codec"


def test_keys_are_changed_one_after_the_other(pool: SlabAllocator) -> None:
    old, both, new = KeyRing({"1": OLD}), KeyRing({"2": NEW, "1": OLD}), KeyRing({"2": NEW})
    by_old, by_both = written(ChunkFormat(keys=old), pool), written(ChunkFormat(keys=both), pool)
    assert isinstance(read(ChunkFormat(keys=both), by_old, pool), torch.Tensor)
    assert isinstance(read(ChunkFormat(keys=new), by_both, pool), torch.Tensor)
    assert read(ChunkFormat(keys=new), by_old, pool) == "no_key"
    assert read(ChunkFormat(), by_old, pool) == "no_key"


def test_another_key_of_the_same_name_is_found_out(pool: SlabAllocator) -> None:
    value = written(ChunkFormat(keys=KeyRing({"1": OLD})), pool)
    assert read(ChunkFormat(keys=KeyRing({"1": NEW})), value, pool) == "tampered"


def test_a_chunk_that_we_have_no_key_for_is_left_to_others(pool: SlabAllocator) -> None:
    value = written(ChunkFormat(keys=KeyRing({"1": OLD})), pool)
    receiver = ChunkReceiver(ChunkFormat(), KEY, pool.allocate)
    assert receiver.begin(len(value), memoryview(value[:HEADER_BYTES])) is None
    assert receiver.take() is None
    assert not receiver.is_damaged


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_with_a_key_what_is_not_encrypted_is_refused_and_removed(codec: str, pool: SlabAllocator) -> None:
    """It was believed once, and so anybody who could write to the store."""
    value = written(ChunkFormat(make_codec(codec)), pool)
    receiver = ChunkReceiver(ChunkFormat(keys=KeyRing({"1": OLD})), KEY, pool.allocate)
    assert receiver.begin(len(value), memoryview(value[:HEADER_BYTES])) is None
    assert receiver.failure == "plaintext"
    assert receiver.is_damaged


def test_what_somebody_without_the_key_has_changed_is_removed(pool: SlabAllocator) -> None:
    """Its checksums are made right. It counted as written with another key once, and stayed."""
    format_ = ChunkFormat(keys=KeyRing({"1": OLD}))
    value = written(format_, pool)
    header, body = ChunkHeader.decode(value[:HEADER_BYTES]), bytearray(value[HEADER_BYTES:])
    body[100] ^= 1
    value = replace(header, checksum=xxh3_128_digest(body)).encode() + bytes(body)
    receiver = ChunkReceiver(format_, KEY, pool.allocate)
    memory = receiver.begin(len(value), memoryview(value[:HEADER_BYTES]))
    assert memory is not None
    memory[:] = body
    receiver.finish()
    assert receiver.take() is None
    assert receiver.failure == "tampered"
    assert receiver.is_damaged


def test_no_two_values_are_the_same(pool: SlabAllocator) -> None:
    format_ = ChunkFormat(keys=KeyRing({"1": OLD}))
    assert written(format_, pool) != written(format_, pool)


def test_a_payload_cannot_be_given_to_another_chunk(pool: SlabAllocator) -> None:
    format_ = ChunkFormat(keys=KeyRing({"1": OLD}))
    value = written(format_, pool)
    assert read(format_, value, pool, OTHER) == "key"


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("encrypted", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_found_out(
    codec: str, encrypted: bool, pool: SlabAllocator, data: st.DataObject
) -> None:
    format_ = ChunkFormat(make_codec(codec), KeyRing({"a": NEW}) if encrypted else None)
    value = bytearray(written(format_, pool))
    if data.draw(st.booleans()):
        value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del value[data.draw(st.integers(0, len(value) - 1)) :]
    assert isinstance(read(format_, bytes(value), pool), str)


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=2 * HEADER_BYTES))
def test_noise_is_no_chunk_and_allocates_nothing(noise: bytes) -> None:
    def allocate(spec: KVSpec) -> None:
        raise AssertionError(f"asked for {spec}")

    receiver = ChunkReceiver(ChunkFormat(), KEY, allocate)
    assert receiver.begin(len(noise), memoryview(noise[:HEADER_BYTES])) is None
    assert receiver.take() is None


@pytest.mark.parametrize(
    ("codec", "spec"),
    [
        ("delta", KVSpec((4, 1, 1, 2, 16, 3), torch.bfloat16, TOKEN_MAJOR, 1)),
        ("delta", KVSpec((4, 2, 0, 2, 16), torch.bfloat16, TOKEN_MAJOR, 0)),
        ("fp8", KVSpec((4, 2, 0, 2, 16), torch.bfloat16, TOKEN_MAJOR, 0)),
        ("fp8", KVSpec((64, 64), torch.int8, "pages", 1)),
        ("zstd", KVSpec((1 << 40, 1 << 40, 0), torch.bfloat16, TOKEN_MAJOR, 0)),
    ],
)
def test_what_its_codec_never_packs_is_damaged_and_allocates_nothing(codec: str, spec: KVSpec) -> None:
    """Their checksums are right. The fuzzer found that such raised in the thread that reads, and were never removed."""

    def allocate(spec: KVSpec) -> None:
        raise AssertionError(f"asked for {spec}")

    packing = Packing(codec, 64 if spec.nbytes else 0)
    body = bytes(packing.nbytes)
    head = ChunkHeader(KEY, spec, xxh3_128_digest(body), packing).encode()
    receiver = ChunkReceiver(ChunkFormat(make_codec(codec)), KEY, allocate)
    assert receiver.begin(len(head) + len(body), memoryview(head)) is None
    assert receiver.is_damaged
    assert receiver.take() is None


def test_small_values_are_sealed_too() -> None:
    format_, plain = ChunkFormat(keys=KeyRing({"1": OLD})), ChunkFormat()
    sealed = format_.seal(b"what the user said", "name")
    assert b"user" not in sealed
    assert format_.unseal(sealed, "name") == b"what the user said"
    assert format_.unseal(sealed, "another name") is None
    assert format_.unseal(b"noise", "name") is None
    assert plain.unseal(plain.seal(b"text", "name"), "name") == b"text"


# Keys


def line(name: str, key: bytes) -> str:
    return f"{name}:{base64.b64encode(key).decode()}"


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the newest first\n{line('2026-11', NEW)}\n\n{line('2026-10', OLD)}  # until December\n")
    file.chmod(0o600)
    ring = KeyRing.from_file(file)
    assert ring.current == "2026-11"
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        KeyRing.from_file(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no encryption key"),
        ("nothing", "id:key"),
        ("a:not base64!", "id:key"),
        (line("a", b"short"), "32 bytes"),
        (line("", OLD), "id:key"),
    ],
)
def test_keys_that_cannot_be_meant(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        KeyRing.parse(text, "the environment")
    assert base64.b64encode(OLD).decode() not in str(caught.value)
    assert "the environment" in str(caught.value)
