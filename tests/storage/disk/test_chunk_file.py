"""A chunk file gives back exactly its bytes, or says why not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from lmcache.keys import CacheKey, SegmentKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_header import ChunkFormatError, ChunkHeader
from lmcache.storage.disk.chunk_file import chunk_file_bytes, read_chunk, write_chunk
from lmcache.storage.disk.direct_io import BLOCK, supports_direct_io
from lmcache.storage.spec_codec import decode_spec, encode_spec
from tests.storage.disk.helpers import SPEC, Heap, content, key_of, spec_of

KEY = key_of(1)
HEADER = ChunkHeader(KEY, SPEC, bytes(16)).encode()


@pytest.fixture(params=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    if request.param == "direct" and not supports_direct_io(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    return bool(request.param == "direct")


def write(path: Path, heap: Heap, direct: bool = False, key: CacheKey = KEY, spec: KVSpec = SPEC) -> None:
    with heap.filled(key, spec) as obj:
        write_chunk(path, key, obj, direct=direct, fsync=True)


def read(path: Path, heap: Heap, direct: bool = False, spec: KVSpec = SPEC) -> bytes:
    with read_chunk(path, KEY, spec, heap.allocate, direct=direct) as obj:
        return obj.bytes.numpy().tobytes()


def reseal(block: bytearray) -> None:
    block[-16:] = xxh3_128_digest(bytes(block[:-16]))


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 3 << 20])
def test_round_trip(tmp_path: Path, heap: Heap, direct: bool, nbytes: int) -> None:
    spec = spec_of(nbytes)
    write(tmp_path / "chunk", heap, direct, spec=spec)
    assert (tmp_path / "chunk").stat().st_size == chunk_file_bytes(nbytes)
    assert read(tmp_path / "chunk", heap, direct, spec) == content(KEY, nbytes)


def test_both_ways_of_writing_give_the_same_file(tmp_path: Path, heap: Heap, direct: bool) -> None:
    write(tmp_path / "a", heap, direct)
    write(tmp_path / "b", heap, False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_padding_does_not_leak_what_lay_in_memory_before(tmp_path: Path, heap: Heap) -> None:
    obj = heap.filled(KEY)
    with obj:
        obj.padded_bytes[SPEC.nbytes :].fill_(0xAA)
        write_chunk(tmp_path / "chunk", KEY, obj, direct=False, fsync=False)
    assert not any((tmp_path / "chunk").read_bytes()[BLOCK + SPEC.nbytes :])


def test_every_flipped_byte_is_found(tmp_path: Path, heap: Heap) -> None:
    path = tmp_path / "chunk"
    write(path, heap)
    sound = path.read_bytes()
    for position in [*range(200), 2000, BLOCK - 16, BLOCK - 1, BLOCK, BLOCK + 5000, BLOCK + SPEC.nbytes - 1]:
        broken = bytearray(sound)
        broken[position] ^= 0x10
        path.write_bytes(broken)
        with pytest.raises(ChunkFormatError):
            read(path, heap)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + SPEC.nbytes])
def test_a_file_of_another_length_is_refused_before_anything_is_allocated(
    tmp_path: Path, heap: Heap, direct: bool, size: int
) -> None:
    path = tmp_path / "chunk"
    write(path, heap)
    path.write_bytes(path.read_bytes()[:size])

    def never(spec: KVSpec) -> MemoryObj:
        raise AssertionError("allocated")

    with pytest.raises(ChunkFormatError) as caught:
        read_chunk(path, KEY, SPEC, never, direct=direct)
    assert caught.value.reason == "size"


def test_a_file_of_another_key_or_spec_is_refused(tmp_path: Path, heap: Heap) -> None:
    write(tmp_path / "key", heap, key=key_of(2))
    write(tmp_path / "kind", heap, key=SegmentKey(KEY))
    write(tmp_path / "spec", heap, spec=KVSpec(SPEC.shape, torch.int8, SPEC.layout, SPEC.num_tokens))
    for name, reason in (("key", "key"), ("kind", "key"), ("spec", "spec")):
        with pytest.raises(ChunkFormatError) as caught:
            read(tmp_path / name, heap)
        assert caught.value.reason == reason


def test_another_format_version_is_named(heap: Heap) -> None:
    block = bytearray(HEADER)
    struct.pack_into("<H", block, 8, 7)
    reseal(block)
    with pytest.raises(ChunkFormatError, match="version 7, this program reads up to 2"):
        ChunkHeader.decode(bytes(block))


def test_no_host_memory_is_an_error_of_its_own(tmp_path: Path, heap: Heap) -> None:
    write(tmp_path / "chunk", heap)
    with pytest.raises(MemoryError):
        read_chunk(tmp_path / "chunk", KEY, SPEC, lambda spec: None, direct=False)


def test_a_spec_too_long_for_the_header_is_refused(tmp_path: Path, heap: Heap) -> None:
    with pytest.raises(ValueError, match="header has room"):
        ChunkHeader(KEY, KVSpec((1,), torch.uint8, "x" * BLOCK, 1), bytes(16)).encode()


@given(st.binary(max_size=2 * BLOCK))
def test_random_bytes_are_no_header(block: bytes) -> None:
    with pytest.raises(ChunkFormatError):
        ChunkHeader.decode(block)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=64))
def test_a_damaged_header_with_a_valid_checksum_is_refused_or_sound(position: int, patch: bytes) -> None:
    """Someone wrote it on purpose: what comes out is bounded and consistent all the same."""
    block = bytearray(HEADER)
    block[position : position + len(patch)] = patch
    reseal(block)
    try:
        header = ChunkHeader.decode(bytes(block))
    except ChunkFormatError:
        return
    assert header.spec.nbytes == SPEC.nbytes
    assert len(header.key) == len(KEY)


@given(st.binary(max_size=300))
def test_random_bytes_as_a_spec_raise_nothing_but_value_error(raw: bytes) -> None:
    try:
        decode_spec(raw)
    except ValueError:
        return


@pytest.mark.parametrize(
    "raw",
    [
        b'{"shape":[9999999999999999999999],"dtype":"uint8","layout":"","num_tokens":1}',
        b'{"shape":[-1],"dtype":"uint8","layout":"","num_tokens":1}',
        b'{"shape":[1,1,1,1,1,1,1,1,1],"dtype":"uint8","layout":"","num_tokens":1}',
        b'{"shape":[1],"dtype":"os.system","layout":"","num_tokens":1}',
        b'{"shape":[1],"dtype":"uint8","layout":"","num_tokens":1,"more":1}',
    ],
)
def test_a_spec_out_of_bounds_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the decoder's
        decode_spec(raw)


@given(
    st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
    st.integers(0, 1 << 30),
)
def test_specs_survive_encoding(shape: list[int], dtype: torch.dtype, layout: str, tokens: int) -> None:
    spec = KVSpec(tuple(shape), dtype, layout, tokens)
    assert decode_spec(encode_spec(spec)) == spec
