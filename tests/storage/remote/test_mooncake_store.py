"""Mooncake, a real one: a master and a client, on this machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Built against libraries that not every machine has.
pytest.importorskip("mooncake.store", exc_type=ImportError)

from mooncake import store as mooncake

from demo.fleet.redis_server import free_port
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import RemoteStoreError, StoreOptions
from lmcache.storage.remote.mooncake_store import MooncakeStore
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.tier import RemoteTier
from tests.storage.conformance import TierConformance
from tests.storage.remote.store_conformance import TIMEOUT, RemoteStoreConformance, got, value
from tests.storage.remote.test_other_sizes import OTHER_SIZES, check_that_others_find_it

MASTER = Path(mooncake.__file__).with_name("mooncake_master")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("mooncake") / "master.log"
    command = [str(MASTER), f"-rpc_port={port}", "-rpc_address=127.0.0.1", f"-metrics_port={free_port()}"]
    with log.open("wb") as file:
        MASTER.chmod(0o755)
        master = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "MC_STORE_MEMCPY": "1"})
    try:
        time.sleep(1.0)
        assert master.poll() is None, log.read_text()[-2000:]
        yield f"mooncake://127.0.0.1:{port}?segment={512 << 20}&buffer={256 << 20}&hostname=127.0.0.1"
    finally:
        master.kill()
        master.wait()


# A client of its own for every test would take minutes: its memory is mounted anew each time.
@pytest.fixture(scope="module")
def shared(url: str) -> Iterator[MooncakeStore]:
    store = MooncakeStore(url, StoreOptions())
    assert store.exists(["connected"], 60.0) == [False]
    yield store
    store.close()


class Borrowed(MooncakeStore):
    """The module's client, which outlives the test."""

    def __init__(self, store: MooncakeStore) -> None:
        self.__dict__.update(store.__dict__)

    def close(self) -> None: ...


class TestMooncake(RemoteStoreConformance):
    arbitrates = False

    @pytest.fixture(autouse=True)
    def _store(self, shared: MooncakeStore) -> None:
        self.shared = shared

    def make_store(self, tmp_path: Path, **options: Any) -> MooncakeStore:
        return Borrowed(self.shared)


class TestRemoteTierOnMooncake(TierConformance):
    @pytest.fixture(autouse=True)
    def _store(self, shared: MooncakeStore) -> None:
        self.shared = shared

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> RemoteTier:
        tier = RemoteTier(Borrowed(self.shared), RemoteSettings(lookup_timeout=5.0), allocate)
        tier.names.generation = os.urandom(8).hex()
        tier.names._refresh_at = time.monotonic() + 3600
        return tier


@OTHER_SIZES
def test_other_numbers_of_ranks_find_what_some_have_kept(shared: MooncakeStore, kept: int, wanted: int) -> None:
    check_that_others_find_it(lambda: Borrowed(shared), kept, wanted, number=10 + kept)


def test_a_second_machine_sees_it(url: str, shared: MooncakeStore) -> None:
    shared.put([value("from the first", b"shared" * 1000)], TIMEOUT)
    other = MooncakeStore(url.replace(f"segment={512 << 20}", f"segment={16 << 20}"), StoreOptions())
    assert other.exists(["from the first"], TIMEOUT) == [True]
    assert got(other, "from the first") == [b"shared" * 1000]
    other.close()


@pytest.mark.parametrize(
    "url", ["mooncake://", "mooncake://host", "mooncake://host:1?mode=x", "mooncake://h:1?segment=x"]
)
def test_a_url_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ValueError, match="remote_url"):
        MooncakeStore(url, StoreOptions())


def test_a_master_that_is_not_there() -> None:
    store = MooncakeStore("mooncake://127.0.0.1:9", StoreOptions())
    with pytest.raises(RemoteStoreError) as caught:
        store.exists(["a"], 2.0)
    assert caught.value.reason == "connection"
    store.close()
