"""What the index says of a chunk whose payload is not its bytes, but packed, encrypted or both."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.chunk_header import Packing
from lmcache.storage.disk.direct_io import BLOCK, round_up
from lmcache.storage.spec_codec import decode_spec, encode_spec


class Packed(NamedTuple):
    """How such a payload lies in its file. How it was packed, and how long it is to the byte, its header says.

    Attributes:
        nbytes: with its padding, so a multiple of 4096: few of them differ, and a table of millions can share them.
        key_id: the key it is encrypted with; empty if it is not.
    """

    nbytes: int
    key_id: str = ""

    @classmethod
    def of(cls, packing: Packing) -> Packed:
        return cls(round_up(packing.nbytes), packing.key_id)


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    spec: msgspec.Raw
    nbytes: Annotated[int, msgspec.Meta(ge=BLOCK, le=1 << 41, multiple_of=BLOCK)]
    key_id: Annotated[str, msgspec.Meta(max_length=64)]


_decoder = msgspec.json.Decoder(_Record)
_BEGIN = b'{"spec":'


def encode_stored(spec: KVSpec, packed: Packed | None) -> bytes:
    """JSON; that of ``spec`` alone where the payload is the chunk's bytes."""
    plain = encode_spec(spec)
    return plain if packed is None else msgspec.json.encode(_Record(msgspec.Raw(plain), *packed))


def decode_stored(raw: bytes) -> tuple[KVSpec, Packed | None]:
    """Raises:
    ValueError: ``raw`` is not what :func:`encode_stored` writes.
    """
    if not raw.startswith(_BEGIN):
        return decode_spec(raw), None
    record = _decoder.decode(raw)
    return decode_spec(bytes(record.spec)), Packed(record.nbytes, record.key_id)
