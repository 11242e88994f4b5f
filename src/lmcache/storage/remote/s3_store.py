"""``s3://bucket/prefix``: any store that speaks S3, through ``obstore``.

Parameters of the URL: ``endpoint`` (of a store that is not Amazon's, ``http://minio:9000`` say), ``region``, and
``virtual_hosted=true`` where the bucket is part of the host name. Credentials come from the environment
(``AWS_ACCESS_KEY_ID`` …), from the machine's role, or, with boto3 installed, from where the AWS tools look.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store as Bucket

from lmcache.storage.remote.interface import Receiver, RemoteStore, RemoteStoreError, StoreOptions, Value, Wanted

T = TypeVar("T")

_SETTINGS = {"endpoint", "region", "virtual_hosted"}
# Small requests are all latency: more of them at once than large ones.
_SMALL_AT_ONCE = 64
# Above this, an upload is cut into parts that go at once.
_MULTIPART_BYTES = 16 << 20
_PART_BYTES = 8 << 20
_STREAM_BYTES = 1 << 20


class S3Store(RemoteStore):
    """Every call is a batch of requests that are under way at the same time, on one event loop in a thread of its own.

    S3 shows a value whole or not at all. It has no way to say who of several should write one, so two servers that
    compute the same chunk at the same moment may both write it. ``ttl_seconds`` is the bucket's own lifecycle rule.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        parts = urlsplit(url)
        given = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if unknown := sorted(given.keys() - _SETTINGS):
            raise ValueError(f"remote_url={url!r}: s3:// has no setting {', '.join(unknown)}, only {sorted(_SETTINGS)}")
        if not parts.netloc or "@" in parts.netloc:
            raise ValueError(f"remote_url={url!r}: must be s3://bucket/prefix; credentials come from the environment")
        if options.ttl_seconds is not None:
            raise ValueError("remote_ttl_seconds: S3 has none; give the bucket a lifecycle rule")
        self._bucket = _open(parts.netloc, unquote(parts.path).strip("/"), given)
        self._at_once = options.connections
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lmcache-s3", daemon=True)
        self._thread.start()

    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        return self._all(map(self._exists, names), _SMALL_AT_ONCE, timeout)

    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        self._all((self._get(name, receiver) for name, receiver in wanted), self._at_once_of(wanted), timeout)

    def put(self, values: Sequence[Value], timeout: float) -> None:
        self._all(map(self._put, values), self._at_once if _is_large(values) else _SMALL_AT_ONCE, timeout)

    def delete(self, names: Sequence[str], timeout: float) -> None:
        self._all(map(self._delete, names), _SMALL_AT_ONCE, timeout)

    def read_range(self, name: str, start: int, memory: memoryview, timeout: float) -> bool:
        """Fill ``memory`` with the bytes of a value from ``start`` on; False where it is not there.

        A layer's share of a chunk is one such range: a token-major payload has one layer after the other.
        """
        return self._all([self._read_range(name, start, memory)], 1, timeout)[0]

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _exists(self, name: str) -> bool:
        try:
            await obstore.head_async(self._bucket, name)
        except FileNotFoundError:
            return False
        return True

    async def _get(self, name: str, receiver: Receiver) -> None:
        try:
            result = await obstore.get_async(self._bucket, name)
        except FileNotFoundError:
            return
        nbytes = result.meta["size"]
        head = bytearray(min(nbytes, receiver.head_bytes))
        memory: memoryview | None = memoryview(head)
        in_head, done = True, 0
        if not head:
            memory, in_head = receiver.begin(nbytes, memoryview(head)), False
        async for data in result.stream(min_chunk_size=_STREAM_BYTES):
            rest = memoryview(data)
            while rest.nbytes and memory is not None:
                taken = min(rest.nbytes, memory.nbytes - done)
                memory[done : done + taken] = rest[:taken]
                rest, done = rest[taken:], done + taken
                if in_head and done == memory.nbytes:
                    memory, in_head, done = receiver.begin(nbytes, memoryview(head)), False, 0
            if memory is None:
                return  # the connection goes with the stream
        assert memory is not None or nbytes == 0
        if memory is not None and not in_head:
            if done != memory.nbytes:
                raise RemoteStoreError("short", f"{name} ended before its length", is_outage=False)
            receiver.finish()

    async def _put(self, value: Value) -> None:
        if value.nbytes <= _MULTIPART_BYTES:
            await obstore.put_async(self._bucket, value.name, b"".join(value.parts), use_multipart=False)
            return
        pieces = chain.from_iterable(_pieces(part) for part in value.parts)
        await obstore.put_async(self._bucket, value.name, pieces, use_multipart=True, chunk_size=_PART_BYTES)

    async def _delete(self, name: str) -> None:
        try:
            await obstore.delete_async(self._bucket, name)
        except FileNotFoundError:
            return

    async def _read_range(self, name: str, start: int, memory: memoryview) -> bool:
        try:
            data = await obstore.get_range_async(self._bucket, name, start=start, length=memory.nbytes)
        except FileNotFoundError:
            return False
        if len(data) != memory.nbytes:
            raise RemoteStoreError("short", f"{name} ended before its length", is_outage=False)
        memory[:] = memoryview(data)
        return True

    def _at_once_of(self, wanted: Sequence[Wanted]) -> int:
        # Small values have room in their heads.
        return _SMALL_AT_ONCE if len(wanted) > _SMALL_AT_ONCE else self._at_once

    def _all(self, requests: Iterable[Coroutine[Any, Any, T]], at_once: int, timeout: float) -> list[T]:
        """What the requests give, all of them ended when this returns or raises."""
        waiting = asyncio.run_coroutine_threadsafe(_run_all(list(requests), at_once, timeout), self._loop)
        try:
            return waiting.result()
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise RemoteStoreError("timeout", f"no answer in {timeout:.3g} s") from error
        except RemoteStoreError:
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise RemoteStoreError("auth", str(error)) from error
        except FileNotFoundError as error:
            raise RemoteStoreError("no_bucket", str(error)) from error
        except (BaseError, OSError) as error:
            raise RemoteStoreError(_word(str(error)), str(error)) from error


async def _run_all(requests: Sequence[Coroutine[Any, Any, T]], at_once: int, timeout: float) -> list[T]:
    slots = asyncio.Semaphore(at_once)
    deadline = time.monotonic() + timeout

    async def run(request: Awaitable[T]) -> T:
        async with slots:
            return await asyncio.wait_for(request, max(0.001, deadline - time.monotonic()))

    tasks = [asyncio.ensure_future(run(request)) for request in requests]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _open(bucket: str, prefix: str, settings: dict[str, str]) -> Bucket:
    config: dict[str, Any] = {"virtual_hosted_style_request": settings.get("virtual_hosted", "") == "true"}
    client: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=10)}
    if endpoint := settings.get("endpoint"):
        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise ValueError(f"remote_url: endpoint={endpoint!r} must begin with http:// or https://")
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if region := settings.get("region"):
        config["region"] = region
    try:
        return Bucket(
            bucket,
            prefix=prefix or None,
            config=config,  # type: ignore[arg-type]
            client_options=client,  # type: ignore[arg-type]
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=30)},
            credential_provider=_credentials(),
        )
    except (BaseError, ValueError) as error:
        raise ValueError(f"remote_url: s3://{bucket} cannot be opened: {error}") from error


def _credentials() -> Callable[[], Any] | None:
    """What the AWS tools would use, where their library is installed; else obstore's own way."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    session = boto3.session.Session()
    return Boto3CredentialProvider(session) if session.get_credentials() is not None else None


def _is_large(values: Sequence[Value]) -> bool:
    return any(value.nbytes > _STREAM_BYTES for value in values)


def _pieces(part: memoryview) -> Iterable[memoryview]:
    data = part.cast("B")
    return (data[start : start + _PART_BYTES] for start in range(0, data.nbytes, _PART_BYTES))


def _word(text: str) -> str:
    lowered = text.lower()
    for word, signs in (
        ("timeout", ("timed out", "timeout")),
        ("connection", ("connect", "dns", "connection", "error sending request")),
        ("no_bucket", ("nosuchbucket", "404")),
        ("auth", ("accessdenied", "forbidden", "403", "signature")),
        ("busy", ("slowdown", "503", "429")),
    ):
        if any(sign in lowered for sign in signs):
            return word
    return "error"
