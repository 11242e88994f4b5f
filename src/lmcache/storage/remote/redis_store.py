"""``redis://``, ``rediss://`` (TLS), ``unix://`` and ``redis-cluster://``: Redis and Valkey, with the official client.

URLs are those of the client (https://redis.readthedocs.io, ``from_url``), its settings among their parameters, such as
``ssl_ca_certs``. Our own parameter ``prefix`` stands in front of every name.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from lmcache.storage.remote.interface import RemoteStore, RemoteStoreError, StoreOptions, Value, Wanted
from lmcache.storage.remote.redis_connections import RedisConnections
from lmcache.storage.remote.redis_wire import Argument, RedisReplyError, RedisWire

T = TypeVar("T")

# At once on one connection: the server keeps what we have not read yet.
_PIPELINED = 512
_PIPELINED_BYTES = 64 << 20
_CLAIM = ":writing"


class RedisStore(RemoteStore):
    """Several commands go out before the first reply is read. In a cluster, each node gets those of its slots."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._url, ours = _split(url)
        self._prefix = ours.get("prefix", "")
        self._ttl = options.ttl_seconds
        self._connections = options.connections
        self._lock = threading.Lock()
        self._cluster: RedisCluster | None = None
        self._nodes: dict[str, RedisConnections] = {}
        settings = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
        try:
            pool = redis.ConnectionPool.from_url(self._url, **settings)
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError) as error:
            raise ValueError(f"remote_url: {_without_password(self._url)} cannot be meant: {error}") from None
        self._single = None
        if urlsplit(url).scheme != "redis-cluster":
            self._single = RedisConnections(pool.connection_class, pool.connection_kwargs, self._connections)

    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        return self._each(names, timeout, lambda name: [[b"EXISTS", name]], lambda wire, _: wire.reply() == 1)

    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        receivers = [receiver for _, receiver in wanted]
        names = [name for name, _ in wanted]
        self._each(names, timeout, lambda name: [[b"GET", name]], lambda wire, at: wire.value(receivers[at]))

    def put(self, values: Sequence[Value], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for batch in _batches(values):
            self._put(batch, deadline - time.monotonic())

    def _put(self, values: list[Value], timeout: float) -> None:
        parts = {self._name(value.name): value.parts for value in values}

        def commands(name: bytes) -> list[list[Argument]]:
            return [self._set(name, parts[name]), [b"DEL", name + _CLAIM.encode()]]

        self._each([value.name for value in values], timeout, commands, lambda wire, _: _both(wire.reply, wire.reply))

    def delete(self, names: Sequence[str], timeout: float) -> None:
        self._each(names, timeout, lambda name: [[b"DEL", name]], lambda wire, _: wire.reply())

    def claim(self, names: Sequence[str], seconds: float, timeout: float) -> list[bool]:
        lifetime = b"%d" % max(1, round(1000 * seconds))

        def commands(name: bytes) -> list[Sequence[Argument]]:
            # The claim first: of two who see no value, the later one sees the claim, or the value.
            return [[b"SET", name + _CLAIM.encode(), b"1", b"NX", b"PX", lifetime], [b"EXISTS", name]]

        def is_mine(wire: RedisWire, _: int) -> bool:
            claimed, exists = _both(wire.reply, wire.reply)
            return claimed is not None and exists == 0

        return self._each(names, timeout, commands, is_mine)

    def close(self) -> None:
        with self._lock:
            cluster, self._cluster = self._cluster, None
            every = [*self._nodes.values(), *([self._single] if self._single else [])]
        for connections in every:
            connections.close()
        if cluster is not None:
            cluster.close()

    def _name(self, name: str) -> bytes:
        # A claim and its value must lie on one node of a cluster; names hold no braces of their own.
        return f"{self._prefix}{{{name}}}".encode()

    def _set(self, name: bytes, parts: tuple[memoryview, ...]) -> list[Argument]:
        command: list[Argument] = [b"SET", name, parts]
        return command if self._ttl is None else [*command, b"PX", b"%d" % max(1, round(1000 * self._ttl))]

    def _each(
        self,
        names: Sequence[str],
        timeout: float,
        commands: Callable[[bytes], Sequence[Sequence[Argument]]],
        read: Callable[[RedisWire, int], T],
    ) -> list[T]:
        """Send the commands of each name, and read its replies with ``read(wire, index of the name)``."""
        deadline = time.monotonic() + timeout
        results: dict[int, T] = {}
        error: RedisReplyError | None = None
        for moved in (False, True):
            left = [at for at in range(len(names)) if at not in results]
            for connections, indices in self._by_node(names, left, deadline, refresh=moved):
                for start in range(0, len(indices), _PIPELINED):
                    batch = indices[start : start + _PIPELINED]
                    with _as_store_errors(self._forget_nodes), connections.use(deadline) as wire:
                        wire.send([command for at in batch for command in commands(self._name(names[at]))])
                        for at in batch:
                            try:
                                results[at] = read(wire, at)
                            except RedisReplyError as failed:  # noqa: PERF203 - the others have replies too
                                error = failed
            if error is None or error.reason not in ("moved", "ask"):
                break
            if not moved:
                error = None
        if error is not None:
            raise error
        return [results[at] for at in range(len(names))]

    def _by_node(
        self, names: Sequence[str], indices: Sequence[int], deadline: float, *, refresh: bool
    ) -> list[tuple[RedisConnections, list[int]]]:
        if self._single is not None:
            return [(self._single, list(indices))]
        with _as_store_errors(), self._lock:
            cluster = self._cluster_client(deadline)
            if refresh:
                cluster.nodes_manager.initialize()
            groups: defaultdict[str, list[int]] = defaultdict(list)
            for at in indices:
                node = cluster.get_node_from_key(self._name(names[at]))  # type: ignore[no-untyped-call]
                if node.name not in self._nodes:
                    pool = cluster.get_redis_connection(node).connection_pool
                    self._nodes[node.name] = RedisConnections(
                        pool.connection_class, pool.connection_kwargs, self._connections
                    )
                groups[node.name].append(at)
            return [(self._nodes[name], group) for name, group in groups.items()]

    def _forget_nodes(self) -> None:
        """A node failed: another may have taken its place by the next call."""
        with self._lock:
            self._cluster = None

    def _cluster_client(self, deadline: float) -> RedisCluster:
        if self._cluster is None:
            timeout = max(0.05, deadline - time.monotonic())
            self._cluster = RedisCluster.from_url(
                self._url, protocol=2, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        return self._cluster


@contextmanager
def _as_store_errors(failed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """``failed`` is called where the connection, or what is behind it, is at fault."""
    try:
        try:
            yield
        except RemoteStoreError:
            raise
        except Exception:
            failed()
            raise
    except RemoteStoreError:
        raise
    except redis.AuthenticationError as error:
        raise RemoteStoreError("auth", str(error)) from error
    except (redis.TimeoutError, TimeoutError) as error:
        raise RemoteStoreError("timeout", str(error) or "timed out") from error
    except ssl.SSLError as error:
        raise RemoteStoreError("tls", str(error)) from error
    except (redis.RedisError, OSError, ValueError) as error:
        raise RemoteStoreError(_word(error), str(error)) from error


def _word(error: Exception) -> str:
    if isinstance(error.__cause__, ssl.SSLError) or "certificate" in str(error).lower():
        return "tls"
    return "connection" if isinstance(error, redis.ConnectionError | OSError) else "protocol"


def _both(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """What both give: the second reply is read also when the first is an error."""
    try:
        one = first()
    except RedisReplyError:
        second()
        raise
    return one, second()


def _batches(values: Sequence[Value]) -> Iterator[list[Value]]:
    batch: list[Value] = []
    size = 0
    for value in values:
        if batch and size + value.nbytes > _PIPELINED_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(value)
        size += value.nbytes
    if batch:
        yield batch


def _split(url: str) -> tuple[str, dict[str, str]]:
    """The URL for the client, and our own parameters."""
    parts = urlsplit(url)
    if parts.scheme != "unix" and not parts.hostname:
        raise ValueError(f"remote_url={_without_password(url)!r}: names no host")
    given = parse_qsl(parts.query, keep_blank_values=True)
    ours = {name: value for name, value in given if name == "prefix"}
    theirs = urlencode([(name, value) for name, value in given if name != "prefix"])
    address = url.partition("?")[0].replace("redis-cluster://", "redis://", 1)
    return (f"{address}?{theirs}" if theirs else address), ours


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":***@", 1)
