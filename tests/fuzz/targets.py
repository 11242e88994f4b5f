"""What must hold for any bytes that come from a disk or a network. Each target raises where it does not."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3
from xxhash import xxh3_128_digest

from lmcache.keys import KEY_BYTES, Namespace, prefix_keys
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.segmentation import shared_passages
from lmcache.segmentation.passage_row import decode_row
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkFormatError, ChunkHeader, Packing
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.codecs.interface import CodecError
from lmcache.storage.disk.chunk_file import read_chunk
from lmcache.storage.disk.index import IndexRow, _parse_row
from lmcache.storage.disk.packed import Packed
from lmcache.storage.encryption import KeyRing
from lmcache.storage.remote.chunk_receiver import ChunkReceiver
from lmcache.storage.remote.interface import Receiver, RemoteStoreError
from lmcache.storage.remote.redis_wire import RedisWire

SPEC = KVSpec((3, 2, 16, 2, 8), torch.bfloat16, TOKEN_MAJOR, 16)
MAX_ALLOCATION = 1 << 22
DTYPES = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]
LAYOUTS = [TOKEN_MAJOR, "another"]
(KEY,) = prefix_keys(Namespace("model", "bfloat16", TOKEN_MAJOR), [1, 2, 3, 4], 4)
NUMBERS = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(0)).cumsum(2).to(SPEC.dtype)
FORMATS = [
    ChunkFormat(make_codec(codec), KeyRing({"key": bytes(range(32))}) if encrypted else None)
    for codec in CODEC_NAMES
    for encrypted in (False, True)
]


def new_object(spec: KVSpec) -> MemoryObj | None:
    if spec.nbytes > MAX_ALLOCATION:
        return None
    padded = max(4096, -(-spec.nbytes // 4096) * 4096)
    return MemoryObj(spec, torch.zeros(padded, dtype=torch.uint8), 0, lambda obj: None)


def _written(format_: ChunkFormat) -> bytes:
    obj = new_object(SPEC)
    assert obj is not None
    obj.tensor.copy_(NUMBERS)
    return b"".join(format_.encode(KEY, obj))


VALUES = [_written(format_) for format_ in FORMATS]
EXPECTED: list[torch.Tensor] = []


def header(data: bytes) -> None:
    """A header is refused, or says the same when it is written again."""
    block = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
    try:
        found = ChunkHeader.decode(block)
    except ChunkFormatError:
        return
    assert ChunkHeader.decode(found.encode()) == found


def changed_value(data: bytes) -> None:
    """A value with changed bytes is refused: what is taken is what was written."""
    if len(data) < 4:
        return
    number = data[0] % len(FORMATS)
    value = bytearray(VALUES[number])
    for at in range(1, len(data) - 3, 3):
        value[int.from_bytes(data[at : at + 2], "little") % len(value)] ^= data[at + 2]
    if data[-1] % 4 == 0:
        del value[int.from_bytes(data[1:3], "little") % len(value) :]
    found = taken(FORMATS[number], bytes(value))
    if not EXPECTED:
        EXPECTED.extend(_must(taken(format_, whole)) for format_, whole in zip(FORMATS, VALUES, strict=True))
    assert found is None or torch.equal(found, EXPECTED[number])


def any_value(data: bytes) -> None:
    """No value makes us take more memory than its chunk has, or fail in another way than by refusing it."""
    if data:
        taken(FORMATS[data[0] % len(FORMATS)], data[1:])


def taken(format_: ChunkFormat, value: bytes) -> torch.Tensor | None:
    receiver = ChunkReceiver(format_, KEY, new_object)
    memory = receiver.begin(len(value), memoryview(value[:HEADER_BYTES]))
    if memory is not None:
        assert memory.nbytes == len(value) - HEADER_BYTES <= MAX_ALLOCATION + 64
        memory[:] = value[HEADER_BYTES:]
        receiver.finish()
    obj = receiver.take()
    if obj is None:
        assert receiver.failure is not None
        return None
    return obj.tensor


def sealed_value(data: bytes) -> None:
    """What is behind the checksums: a value whose own are right is refused, or taken, however little it makes sense."""
    if len(data) < 24:
        return
    number, dtype, kind, key_id, written, dims = data[0], data[1], data[2], data[3], data[4], data[5]
    body = VALUES[number % len(FORMATS)][HEADER_BYTES:] if written % 2 else data[24:]
    if written % 4 == 3:
        body = bytes(a ^ b for a, b in zip(body, data[24:], strict=False)) + body[len(data) - 24 :]
    sizes = [1 << (size - 200) if size >= 200 else size for size in data[6 : 7 + dims % 8]]
    shape = SPEC.shape if dims >= 128 else tuple(min(size, 1 << 40) for size in sizes)
    spec = KVSpec(shape, SPEC.dtype if dtype >= 128 else DTYPES[dtype % len(DTYPES)], LAYOUTS[data[15] % 2], data[16])
    names = [*CODEC_NAMES, "another"]
    packing = Packing(names[kind % len(names)], len(body), ["", "key", "other"][key_id % 3], data[17 : 17 + key_id % 8])
    if kind % 7 == 0:
        packing = Packing(packing.codec, max(0, len(body) - data[16]), packing.key_id, packing.nonce)
    block = ChunkHeader(KEY, spec, xxh3_128_digest(body), packing).encode()
    taken(FORMATS[number % len(FORMATS)], block + body)


def sealed_header(data: bytes) -> None:
    """A header of any fields whose checksum is right."""
    block = bytearray(VALUES[(data[0] if data else 0) % len(VALUES)][:HEADER_BYTES])
    for at in range(1, len(data) - 2, 3):
        block[int.from_bytes(data[at : at + 2], "little") % 512] ^= data[at + 2]
    block[-16:] = xxh3_128_digest(bytes(block[:-16]))
    header(bytes(block))


def index_row(data: bytes) -> None:
    """A row of a disk's index makes sense, or is its bare number."""
    number, at = len(data), len(data) // 2
    key = data[:KEY_BYTES]
    stored = b'{"spec":' + data[KEY_BYTES:]
    for raw in (
        (number, 0, key, data[KEY_BYTES:], 1),
        (number, 0, key, stored, 1),
        (number, at % 4, data[:at], data[at:], data),
    ):
        row = _parse_row(raw, {})
        assert row == number or (isinstance(row, IndexRow) and row.file_id == number)


def packed_file(data: bytes) -> None:
    """A file of the disk tier with changed bytes, or another row of the index for it, is refused, or is what was
    written."""
    if len(data) < 4:
        return
    number = data[0] % len(FORMATS)
    value = bytearray(VALUES[number].ljust(-(-len(VALUES[number]) // HEADER_BYTES) * HEADER_BYTES, b"\0"))
    packing = ChunkHeader.decode(bytes(value[:HEADER_BYTES])).packing
    packed = None if packing is None else Packed.of(packing)
    if data[-1] % 8 == 0:
        packed = Packed((data[1] + 1) * HEADER_BYTES, "key")
    for at in range(1, len(data) - 3, 3):
        value[int.from_bytes(data[at : at + 2], "little") % len(value)] ^= data[at + 2]
    with tempfile.NamedTemporaryFile() as file:
        file.write(value)
        file.flush()
        try:
            obj = read_chunk(
                Path(file.name), KEY, SPEC, new_object, direct=False, packed=packed, chunk_format=FORMATS[number]
            )
        except ChunkFormatError:
            return
    assert torch.equal(obj.tensor, _must(taken(FORMATS[number], VALUES[number])))


def codec(data: bytes) -> None:
    if not data:
        return
    made = make_codec(CODEC_NAMES[data[0] % len(CODEC_NAMES)])
    try:
        made.decode(memoryview(data[1:]), torch.empty(SPEC.shape, dtype=SPEC.dtype), SPEC)
    except CodecError:
        return


def passages(data: bytes) -> None:
    for row in shared_passages._rows(data, blake3(data).digest()):
        assert row.tokens.ndim == 1
    at = len(data) // 2
    decode_row(data[:at], data[at:], blake3(data).digest())


class _Socket:
    """Says ``data``, a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def settimeout(self, seconds: float) -> None: ...

    def sendall(self, data: object) -> None: ...

    def recv_into(self, memory: memoryview) -> int:
        count = min(len(memory), 7, len(self._data) - self._at)
        memory[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count


class _Bounded(Receiver):
    head_bytes = 16

    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        return memoryview(bytearray(nbytes - len(head))) if nbytes < MAX_ALLOCATION else None

    def finish(self) -> None: ...


def redis_reply(data: bytes) -> None:
    """A connection that says anything is given up, or understood."""
    if not data:
        return
    wire = RedisWire(_Socket(data[1:]), time.monotonic() + 60)
    wire.send([[b"GET", b"name"]] * 2)
    read = (lambda: wire.value(_Bounded())) if data[0] % 2 else wire.reply
    for _ in range(2):
        if not _goes_on(read, wire):
            return


def _goes_on(read: Callable[[], object], wire: RedisWire) -> bool:
    try:
        read()
    except RemoteStoreError:
        return True
    except (ConnectionError, TimeoutError, ValueError):
        assert not wire.is_clean
        return False
    return True


def key_ring(data: bytes) -> None:
    try:
        KeyRing.parse(data.decode("utf-8", "replace"), "source")
    except ValueError:
        return


def _must(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.clone()


TARGETS: list[Callable[[bytes], None]] = [
    header,
    changed_value,
    any_value,
    codec,
    passages,
    redis_reply,
    key_ring,
    sealed_value,
    sealed_header,
    index_row,
    packed_file,
]
