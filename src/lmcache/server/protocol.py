"""What a client and the server say to each other: msgpack in the frames of :mod:`lmcache.sockets.frames`.

A session is one connection, and lives as long as it: the *events*, on which both sides send what needs no answer. With
its :class:`Welcome` the server sends one end of a second connection: the *calls*, on which every request is answered in
turn. KV never travels on either. A chunk is named by a *handle*, which stands for one reference that the server holds
for this session, and by its place in memory that both have mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, TypeAlias

import msgspec

from lmcache.keys import KEY_BYTES, CacheKey, PrefixKey, SegmentKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.interface import TierStats
from lmcache.storage.spec_codec import decode_spec, encode_spec

PROTOCOL = 1
MAX_KEYS = 1 << 20

Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Rows: TypeAlias = "list[tuple[bytes, bytes, bytes]]"
"""Passages, each as :func:`lmcache.segmentation.passage_row.encode_row` writes it."""


class Message(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of one side to the other."""


class Keys(msgspec.Struct, frozen=True, array_like=True):
    """One after the other; ``kinds`` has a byte for each, or one for all."""

    kinds: bytes
    raw: bytes

    @classmethod
    def of(cls, keys: Sequence[CacheKey]) -> Keys:
        kinds = bytes(isinstance(key, SegmentKey) for key in keys)
        return cls(kinds[:1] if len(set(kinds)) == 1 else kinds, b"".join(keys))

    def decode(self) -> list[CacheKey]:
        """Raises:
        ValueError: these are no keys.
        """
        count, rest = divmod(len(self.raw), KEY_BYTES)
        kinds = self.kinds * count if len(self.kinds) == 1 else self.kinds
        if rest or len(kinds) != count or count > MAX_KEYS or kinds.strip(b"\0\1"):
            raise ValueError(f"{len(self.raw)} bytes are no {len(self.kinds)} keys")
        raw = self.raw
        # The length is right, so skip the check of a key's own constructor: this loop is the hot one.
        makers = (partial(bytes.__new__, PrefixKey), partial(bytes.__new__, SegmentKey))
        return [makers[kind](raw[i * KEY_BYTES : (i + 1) * KEY_BYTES]) for i, kind in enumerate(kinds)]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a chunk lies: at byte ``offset`` of slab ``slab``. ``spec`` counts into a list beside it."""

    handle: Size
    slab: Size
    offset: Size
    spec: Size


class Hit(msgspec.Struct, frozen=True, array_like=True):
    """A chunk of :class:`Acquired`: its place, or None while the server reads it. ``tier`` counts into the tiers of
    :class:`Welcome`."""

    tier: Size
    place: Place | None


# Events, in both directions


class Hello(Message, frozen=True):
    """The client's first message."""

    protocol: int
    pid: int


class Welcome(Message, frozen=True):
    """The server's first. ``generation`` names this run of the server: nothing of another is valid in it. ``asks``: it
    has tiers that know what they hold only when asked."""

    protocol: int
    generation: bytes
    asks: bool
    tiers: list[str]


class Goodbye(Message, frozen=True):
    """The server's first message to a client that it does not serve, and why."""

    reason: str


class Release(Message, frozen=True):
    """The client is done with these handles."""

    handles: list[Size]


class Publish(Message, frozen=True):
    """Passages that a client has found."""

    rows: Rows


class Subscribe(Message, frozen=True):
    """The client wants to know all passages, and those to come."""


class Passages(Message, frozen=True):
    """What :class:`Subscribe` asked for. ``complete``: those that were known before have all been sent."""

    rows: Rows
    complete: bool


class Arrived(Message, frozen=True):
    """A read has ended; without a place, as a miss."""

    ticket: Size
    place: Place | None
    specs: list[bytes]


class Answered(Message, frozen=True):
    """What :class:`Ask` wanted to know is known."""

    ticket: Size


# Calls, and what they are answered with


class Find(Message, frozen=True):
    """Which tiers have the leading hits: :class:`Found`."""

    keys: Keys


class Holds(Message, frozen=True):
    """Which are held: :class:`Flags`."""

    keys: Keys


class Ask(Message, frozen=True):
    """Find out, and send :class:`Answered` when done: :class:`Done`."""

    keys: Keys
    ticket: Size
    timeout: float


class Acquire(Message, frozen=True):
    """Hold chunks; key ``i`` has the ticket ``first_ticket + i`` if it must be read first: :class:`Acquired`."""

    keys: Keys
    first_ticket: Size
    leading: bool


class Allocate(Message, frozen=True):
    """Room for one chunk: :class:`Acquired`, with one hit or none."""

    spec: bytes


class Put(Message, frozen=True):
    """Make a chunk visible: :class:`Flags`."""

    keys: Keys
    handle: Size


class Renew(Message, frozen=True):
    """:class:`Flags`."""

    keys: Keys


class Pin(Message, frozen=True):
    """:class:`Number`."""

    keys: Keys


class Unpin(Message, frozen=True):
    """:class:`Done`."""

    keys: Keys


class Clear(Message, frozen=True):
    """:class:`Number`."""


class Flush(Message, frozen=True):
    """Whether all is written: :class:`Flags`. Does not wait."""


class Stats(Message, frozen=True):
    """:class:`TierCounts`."""


class MapSlab(Message, frozen=True):
    """:class:`Number`, the slab's bytes, with its descriptor; :class:`Refused` if it is gone."""

    slab: Size


class Done(Message, frozen=True): ...


class Number(Message, frozen=True):
    number: Size


class Flags(Message, frozen=True):
    """A byte for each key: 0 or 1."""

    flags: bytes


class Found(Message, frozen=True):
    """The number of the tier of each hit, a byte each."""

    tiers: bytes


class Acquired(Message, frozen=True):
    hits: list[Hit | None]
    specs: list[bytes]


class TierCounts(Message, frozen=True):
    """By tier, fastest first."""

    tiers: dict[str, TierStats]


class Refused(Message, frozen=True):
    """The request could not be understood, or failed."""

    reason: str


Call: TypeAlias = Find | Holds | Ask | Acquire | Allocate | Put | Renew | Pin | Unpin | Clear | Flush | Stats | MapSlab
Reply: TypeAlias = Done | Number | Flags | Found | Acquired | TierCounts | Refused
FromClient: TypeAlias = Hello | Release | Publish | Subscribe
FromServer: TypeAlias = Welcome | Goodbye | Passages | Arrived | Answered

calls = msgspec.msgpack.Decoder(Call)
replies = msgspec.msgpack.Decoder(Reply)
from_client = msgspec.msgpack.Decoder(FromClient)
from_server = msgspec.msgpack.Decoder(FromServer)
encode = msgspec.msgpack.Encoder().encode


class SpecTable:
    """The specs of several places, each written once: the chunks of a prompt are all alike."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self._index: dict[KVSpec, int] = {}

    def add(self, spec: KVSpec) -> int:
        if (index := self._index.get(spec)) is None:
            index = self._index[spec] = len(self.raw)
            self.raw.append(encode_spec(spec))
        return index


def decode_specs(raw: list[bytes]) -> list[KVSpec]:
    """Raises:
    ValueError: these are no specs.
    """
    return [decode_spec(each) for each in raw]
