"""What one engine knows of passages, known to all engines of a server."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.segmentation.known_passages import KnownPassages
from lmcache.segmentation.passage_row import PassageRow, decode_row, encode_row
from lmcache.server import protocol as p
from lmcache.server.client import ServerClient


def share_passages(client: ServerClient, known: KnownPassages) -> None:
    """Tell the server what ``known`` learns, and ``known`` what the server has been told by others and in earlier
    runs; ``known.loaded`` is set once it knows that."""

    def learn(rows: p.Rows, complete: bool) -> None:
        known.learn(row for each in rows if (row := decode_row(*each)) is not None)
        if complete:
            known.loaded.set()

    def publish(rows: Sequence[PassageRow]) -> None:
        if (attachment := client.attachment) is not None:
            attachment.send(p.Publish([encode_row(row) for row in rows]))

    known.publish = publish
    client.subscribe(learn)
