"""Passages that one server knows, found by the others through the store that they share.

Consecutive chunks are written down together, as a *record*: rows of :mod:`lmcache.segmentation.passage_row`. Some of
the anchors of their tokens become names in the store, whose values say which record has them. Who has a prompt asks for
the anchors of its tokens, then for the records, then which of their chunks the store holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lmcache.segmentation.anchors import DENSITY, anchors
from lmcache.segmentation.known_passages import KnownPassages
from lmcache.segmentation.passage_row import PassageRow, decode_row, encode_row
from lmcache.storage.inquiry import Inquiry
from lmcache.storage.remote.known_keys import KnownKeys
from lmcache.storage.remote.small_values import read_small, write_small
from lmcache.storage.remote.tier import RemoteTier

# Of the anchors, one in two is a name: of a passage of 512 tokens at least one in 1,999 cases of 2,000.
_SHARED_DENSITY = 2 * DENSITY
_RECORD_CHUNKS = 16
_MAX_RECORD_BYTES = 8 << 20
_MAX_ROWS = 4096
_MAX_NAMES = 4096
_ANCHOR, _RECORD = "a", "r"
_DIGEST_BYTES = 32
_PUBLISHED_SECONDS, _PUBLISHED_KEYS = 3600.0, 1 << 18

_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, bytes, bytes]])


class SharedPassages:
    """Whatever the store does not say in time, or says wrongly, is simply not known. Thread-safe, never blocks."""

    def __init__(self, tier: RemoteTier, known: KnownPassages, lookup_timeout: float) -> None:
        """What ``known`` is told is published from now on, and what others published goes into it.

        Args:
            lookup_timeout: seconds that each of the three questions to the store may take.
        """
        self._tier = tier
        self._known = known
        self._timeout = lookup_timeout
        self._published = KnownKeys(_PUBLISHED_SECONDS, _PUBLISHED_KEYS)
        known.publish = self.publish

    def publish(self, rows: Sequence[PassageRow]) -> None:
        """Write down consecutive chunks of one prompt, unless that was done of late."""
        if all(map(self._published.is_fresh, (row.key for row in rows))):
            return
        tier = self._tier
        tier.run_errand(lambda: tier.attempt("publish", lambda: self._publish(rows), None))

    def ask(self, tokens: npt.NDArray[np.uint32], namespace: bytes, seams: Collection[int] = ()) -> Inquiry:
        """Learn what others know of ``tokens``; :meth:`KnownPassages.find` finds it once this is over.

        Args:
            seams: where passages begin.
        """
        names = _anchor_names(tokens, {0, *seams})
        if not names:
            return Inquiry()
        asked = self._tier.run_lookup(
            lambda: self._tier.attempt("passages", lambda: self._learn(names, namespace), None)
        )
        return Inquiry([asked] if asked is not None else [], 3 * self._timeout)

    def _publish(self, rows: Sequence[PassageRow]) -> None:
        values: list[tuple[str, bytes]] = []
        for record in _batches(rows, _RECORD_CHUNKS):
            namespace = record[0].key.namespace_id
            value = msgspec.msgpack.encode([encode_row(row) for row in record])
            digest = blake3(value).digest()
            name = self._name(_RECORD, namespace, digest)
            values.append((name, self._tier.format.seal(value, name)))
            tokens = np.concatenate([row.tokens for row in record])
            starts = np.cumsum([0, *(len(row.tokens) for row in record)])
            seams = [int(start) + seam for row, start in zip(record, starts, strict=False) for seam in row.seams]
            values.extend((self._anchor(namespace, anchor), digest) for anchor in _anchor_names(tokens, seams))
        write_small(self._tier.store, values, self._tier.timeout)
        self._published.add(row.key for row in rows)

    def _learn(self, names: list[bytes], namespace: bytes) -> None:
        store, timeout = self._tier.store, self._timeout
        found = read_small(store, [self._anchor(namespace, name) for name in names], _DIGEST_BYTES, timeout)
        digests = list(dict.fromkeys(digest for digest in found if digest is not None))
        if not digests:
            return
        names_of_records = [self._name(_RECORD, namespace, each) for each in digests]
        records = read_small(store, names_of_records, _MAX_RECORD_BYTES, timeout)
        rows = [
            row
            for digest, name, sealed in zip(digests, names_of_records, records, strict=True)
            if sealed is not None and (record := self._tier.format.unseal(sealed, name)) is not None
            for row in _rows(record, digest)
            if row.key.namespace_id == namespace
        ]
        self._tier.find_out([row.key for row in rows])
        self._known.learn(row for row in rows if self._tier.contains(row.key))

    def _anchor(self, namespace: bytes, name: bytes) -> str:
        # One place an anchor, the newest wins.
        return self._name(_ANCHOR, namespace, name) + ".latest"

    def _name(self, kind: str, namespace: bytes, digest: bytes) -> str:
        return self._tier.names.of_passage(kind, namespace, digest)


def _anchor_names(tokens: npt.NDArray[np.uint32], seams: Collection[int]) -> list[bytes]:
    """Of the windows at seams, and of a share of the others; each 8 bytes, no two the same."""
    at, hashes = anchors(tokens, seams)
    chosen = (hashes & np.uint64(_SHARED_DENSITY - 1)) == 0
    chosen |= np.isin(at, list(seams))
    names = dict.fromkeys(value.tobytes() for value in hashes[chosen].astype("<u8"))
    return list(islice(names, _MAX_NAMES))


def _rows(record: bytes, digest: bytes) -> Iterator[PassageRow]:
    """Those of ``record`` that are as they were written."""
    if blake3(record).digest() != digest:
        return
    try:
        written = _decoder.decode(record)
    except ValueError:  # msgspec's errors are
        return
    for each in written[:_MAX_ROWS]:
        if (row := decode_row(*each)) is not None:
            yield row


def _batches(rows: Sequence[PassageRow], size: int) -> Iterator[Sequence[PassageRow]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
