"""A passage that one server has seen is found by another, through what they share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lmcache.keys import Namespace, prefix_keys
from lmcache.memory.allocator import SlabAllocator
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages
from lmcache.segmentation.passage_index import PassageMatch
from lmcache.segmentation.shared_passages import SharedPassages
from lmcache.storage.remote.file_store import FileStore
from lmcache.storage.remote.interface import StoreOptions
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.tier import RemoteTier
from tests.storage.conformance import SPEC, fill

CHUNK = 64
SPACE = Namespace(model="m", kv_dtype="float32", layout="token-major-1")
OTHER = Namespace(model="m", kv_dtype="float32", layout="token-major-1", cache_salt="another tenant")


def text(length: int, seed: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 50_000, length).astype(np.uint32)


class Server:
    def __init__(self, directory: Path, pool: SlabAllocator) -> None:
        self.pool = pool
        store = FileStore(f"file://{directory}/kv", StoreOptions())
        self.tier = RemoteTier(store, RemoteSettings(), pool.allocate)
        self.known = KnownPassages(CHUNK, self.tier.contains)
        self.shared = SharedPassages(self.tier, self.known, lookup_timeout=30.0)

    def store(self, tokens: npt.NDArray[np.uint32], space: Namespace = SPACE, *, but: int | None = None) -> None:
        """The whole chunks of a prompt; ``but`` one, of which the KV never arrives."""
        chunks = []
        for index, key in enumerate(prefix_keys(space, tokens, CHUNK)):
            start = index * CHUNK
            chunks.append(KnownChunk(key, tokens[start : start + CHUNK], start))
            obj = self.pool.allocate(SPEC)
            assert obj is not None
            with obj:
                fill(obj, key)
                if index != but:
                    assert self.tier.submit_put(key, obj)
        self.known.add_prompt(chunks)
        assert self.tier.flush(30)
        self.settle()

    def settle(self) -> None:
        """Until what was asked of the store before has been done."""
        deadline = time.monotonic() + 30
        while any(self.tier._waiting.values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def find(self, tokens: npt.NDArray[np.uint32], space: Namespace = SPACE) -> list[PassageMatch[object]]:
        self.shared.ask(tokens, space.id).wait()
        return self.known.find(tokens, space.id, min_tokens=CHUNK)  # type: ignore[return-value]


@pytest.fixture
def pool() -> Iterator[SlabAllocator]:
    pool = SlabAllocator(64 << 20)
    yield pool
    pool.close()


@pytest.fixture
def servers(tmp_path: Path, pool: SlabAllocator) -> Iterator[tuple[Server, Server]]:
    servers = (Server(tmp_path, pool), Server(tmp_path, pool))
    yield servers
    for server in servers:
        server.known.close()
        server.tier.close()


def test_a_passage_is_found_wherever_it_stands(servers: tuple[Server, Server]) -> None:
    first, second = servers
    document = text(40 * CHUNK, seed=1)
    first.store(np.concatenate([text(50, 2), document]))
    prompt = np.concatenate([text(333, 3), document, text(100, 4)])
    (match,) = second.find(prompt)
    assert match.start == 333
    # The last chunk was not full, and is not kept.
    assert match.end - match.start >= 39 * CHUNK
    assert match.old_start == 50


def test_nothing_is_known_without_asking(servers: tuple[Server, Server]) -> None:
    first, second = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document)
    assert second.known.find(document, SPACE.id) == []


def test_tenants_do_not_meet(servers: tuple[Server, Server]) -> None:
    first, second = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document, OTHER)
    assert second.find(document) == []
    assert second.find(document, OTHER)


def test_a_chunk_whose_kv_is_not_there_is_left_out(servers: tuple[Server, Server]) -> None:
    first, second = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document, but=10)
    matches = second.find(np.concatenate([text(100, 2), document]))
    before, behind = ((match.start - 100, match.end - 100) for match in matches)
    assert (before, behind) == ((0, 10 * CHUNK), (11 * CHUNK, 20 * CHUNK))


def test_what_is_published_is_not_published_again(servers: tuple[Server, Server]) -> None:
    first, _ = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document)
    files = {path: path.stat().st_mtime_ns for path in first.tier.store.directory.rglob("*")}  # type: ignore[attr-defined]
    first.store(document)
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_damage_and_nonsense_are_not_believed(servers: tuple[Server, Server]) -> None:
    first, second = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document)
    root = first.tier.store.directory / "lmcache/1/0" / SPACE.id.hex()  # type: ignore[attr-defined]
    records = [path for path in root.rglob("r*") if path.is_file()]
    assert records
    for path in records:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    assert second.find(document) == []
    for path in records:
        path.write_bytes(b"\xff" * 100)
    assert second.find(document) == []


def test_a_store_that_fails_means_that_nothing_is_known(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = servers
    document = text(20 * CHUNK, seed=1)
    first.store(document)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(second.tier.store, "get", fail)
        assert second.find(document) == []
    assert second.find(document)
