"""What every remote store must do. A store's test class inherits this and says how it is built, on a real server.

class TestMyStore(RemoteStoreConformance):
    def make_store(self, tmp_path, **options):
        return MyStore("mystore://…", StoreOptions(**options))
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.storage.remote.interface import Receiver, RemoteStore, Value, Wanted
from lmcache.storage.remote.small_values import read_small, write_small

TIMEOUT = 30.0


class Taken(Receiver):
    """Keeps what came."""

    def __init__(self, head_bytes: int = 16, refuses: bool = False) -> None:
        self.head_bytes = head_bytes
        self.refuses = refuses
        self.nbytes: int | None = None
        self.head = b""
        self.rest: bytearray | None = None
        self.finished = False

    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        assert len(head) == min(nbytes, self.head_bytes)
        self.nbytes, self.head = nbytes, bytes(head)
        if self.refuses or nbytes <= self.head_bytes:
            return None
        self.rest = bytearray(nbytes - self.head_bytes)
        return memoryview(self.rest)

    def finish(self) -> None:
        assert self.rest is not None
        self.finished = True

    @property
    def value(self) -> bytes | None:
        if self.nbytes is None:
            return None
        assert self.finished == (self.rest is not None)
        return self.head + bytes(self.rest or b"")


def value(name: str, *parts: bytes) -> Value:
    return Value(name, tuple(map(memoryview, parts)))


def got(store: RemoteStore, *names: str, head_bytes: int = 16) -> list[bytes | None]:
    receivers = [Taken(head_bytes) for _ in names]
    store.get(list(map(Wanted, names, receivers)), TIMEOUT)
    return [receiver.value for receiver in receivers]


class RemoteStoreConformance:
    """Inherit and implement :meth:`make_store`. Every test has names of its own, so that stores may share a server."""

    arbitrates = True
    """Whether of several that claim a name at once only one gets it."""

    def make_store(self, tmp_path: Path, **options: Any) -> RemoteStore:
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[RemoteStore]:
        store = self.make_store(tmp_path)
        yield store
        store.close()

    @pytest.fixture
    def name(self) -> str:
        return f"lmcache/1/0/{os.urandom(16).hex()}/p{os.urandom(32).hex()}"

    def test_what_was_put_comes_back(self, store: RemoteStore, name: str) -> None:
        store.put([value(name, b"head", b"", b"payload" * 1000)], TIMEOUT)
        assert got(store, name) == [b"head" + b"payload" * 1000]

    @pytest.mark.parametrize("head_bytes", [0, 1, 4999, 5000, 5001, 4096])
    def test_the_head_comes_first_however_long(self, store: RemoteStore, name: str, head_bytes: int) -> None:
        content = os.urandom(5000)
        store.put([value(name, content)], TIMEOUT)
        assert got(store, name, head_bytes=head_bytes) == [content]

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 1 << 20, (5 << 20) + 3, 40 << 20])
    def test_any_size(self, store: RemoteStore, name: str, size: int) -> None:
        content = os.urandom(min(size, 1 << 20)) * -(-size // (1 << 20))
        content = content[:size]
        store.put([value(name, content[:7], content[7:])], TIMEOUT)
        assert got(store, name) == [content]

    def test_any_bytes(self, store: RemoteStore, name: str) -> None:
        content = bytes(range(256)) + b"\r\n$-1\r\n\0\0" + bytes(range(255, -1, -1))
        store.put([value(name, content)], TIMEOUT)
        assert got(store, name) == [content]

    def test_many_at_once_in_any_mixture(self, store: RemoteStore, name: str) -> None:
        names = [f"{name}.{index}" for index in range(100)]
        contents = [os.urandom(1 + 997 * (index % 7)) for index in range(100)]
        store.put([value(*each) for each in zip(names, contents, strict=True)][::2], TIMEOUT)
        assert store.exists(names, TIMEOUT) == [index % 2 == 0 for index in range(100)]
        expected = [content if index % 2 == 0 else None for index, content in enumerate(contents)]
        assert got(store, *names) == expected

    def test_one_that_is_refused_does_not_harm_the_others(self, store: RemoteStore, name: str) -> None:
        names = [f"{name}.{index}" for index in range(5)]
        content = os.urandom(3 << 20)
        store.put([value(each, content) for each in names], TIMEOUT)
        receivers = [Taken(refuses=index % 2 == 1) for index in range(5)]
        store.get(list(map(Wanted, names, receivers)), TIMEOUT)
        assert [receiver.finished for receiver in receivers] == [True, False, True, False, True]
        assert all(receiver.value == content for receiver in receivers[::2])
        assert got(store, *names) == [content] * 5

    def test_nothing_there(self, store: RemoteStore, name: str) -> None:
        assert store.exists([name], TIMEOUT) == [False]
        assert got(store, name) == [None]
        store.delete([name], TIMEOUT)

    def test_nothing_asked(self, store: RemoteStore) -> None:
        assert store.exists([], TIMEOUT) == []
        assert store.claim([], 1.0, TIMEOUT) == []
        store.get([], TIMEOUT)
        store.put([], TIMEOUT)
        store.delete([], TIMEOUT)

    def test_delete(self, store: RemoteStore, name: str) -> None:
        store.put([value(name, b"a" * 100), value(name + ".b", b"b" * 100)], TIMEOUT)
        store.delete([name, name + ".never"], TIMEOUT)
        assert store.exists([name, name + ".b"], TIMEOUT) == [False, True]
        store.put([value(name, b"again")], TIMEOUT)
        assert got(store, name) == [b"again"]

    def test_the_latest_wins(self, store: RemoteStore, name: str) -> None:
        for content in (b"first", b"second, which is longer", b"3rd"):
            store.put([value(name + ".latest", content)], TIMEOUT)
            assert got(store, name + ".latest") == [content]

    def test_a_second_store_sees_it(self, store: RemoteStore, name: str, tmp_path: Path) -> None:
        store.put([value(name, b"shared" * 100)], TIMEOUT)
        other = self.make_store(tmp_path)
        try:
            assert other.exists([name], TIMEOUT) == [True]
            assert got(other, name) == [b"shared" * 100]
        finally:
            other.close()

    def test_small_values(self, store: RemoteStore, name: str) -> None:
        write_small(store, [(f"{name}.{index}", b"x" * (index + 1)) for index in range(20)], TIMEOUT)
        names = [f"{name}.{index}" for index in range(21)]
        assert read_small(store, names, 10, TIMEOUT) == [b"x" * (i + 1) if i < 10 else None for i in range(21)]

    def test_what_is_there_cannot_be_claimed(self, store: RemoteStore, name: str) -> None:
        store.put([value(name, b"there")], TIMEOUT)
        assert store.claim([name, name + ".new"], 60.0, TIMEOUT) == [False, True]

    def test_one_of_many_writers_gets_the_claim(self, store: RemoteStore, name: str) -> None:
        if not self.arbitrates:
            pytest.skip("this store cannot arbitrate")
        claims: list[bool] = []
        threads = [threading.Thread(target=lambda: claims.extend(store.claim([name], 60.0, TIMEOUT))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(claims) == [False] * 7 + [True]

    def test_a_claim_that_was_not_used_ends(self, store: RemoteStore, name: str) -> None:
        if not self.arbitrates:
            pytest.skip("this store cannot arbitrate")
        assert store.claim([name], 0.05, TIMEOUT) == [True]
        threading.Event().wait(0.3)
        assert store.claim([name], 0.05, TIMEOUT) == [True]

    def test_a_reader_never_sees_half_a_value(self, store: RemoteStore, name: str) -> None:
        """Values of the same name that differ, each of one letter: what a reader gets is all of one."""
        contents = [letter * (2 << 20) for letter in (b"a", b"b", b"c")]
        done = threading.Event()

        def write() -> None:
            for round_ in range(15):
                store.put([value(name + ".latest", contents[round_ % 3])], TIMEOUT)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = 0
        while not done.is_set() or not seen:
            (content,) = got(store, name + ".latest")
            if content is not None:
                assert content in contents
                seen += 1
        writer.join(60)

    def test_threads(self, store: RemoteStore, name: str) -> None:
        problems: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for index in range(10):
                    mine, content = f"{name}.{number}.{index}", bytes([number]) * (100_000 + index)
                    store.put([value(mine, content)], TIMEOUT)
                    assert got(store, mine) == [content]
                    assert store.exists([mine], TIMEOUT) == [True]
                    store.delete([mine], TIMEOUT)
                    assert got(store, mine) == [None]
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert problems == []

    def test_closing_twice(self, store: RemoteStore) -> None:
        store.close()
