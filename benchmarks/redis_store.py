"""How fast chunks go to and from Redis, against ``redis-benchmark`` with the same size and number of connections.

usage: python -m benchmarks.redis_store [--rounds N] [--json FILE]

A real Redis on this machine. Each round measures all of them, one after the other; the table has medians over the
rounds and ratios within one run. ``redis-py`` is the official client, which makes bytes of every value.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import redis
from rich.console import Console
from rich.table import Table

from demo.fleet.redis_server import RedisServer
from lmcache.storage.remote.interface import Receiver, StoreOptions, Value, Wanted
from lmcache.storage.remote.redis_store import RedisStore

CONNECTIONS = 4
BYTES = 512 << 20
"""Moved in each measurement."""
KEYS = 16


class Into(Receiver):
    """Host memory that is there already, as the pool's is."""

    head_bytes = 4096

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def begin(self, nbytes: int, head: memoryview) -> memoryview:
        return self._memory[: nbytes - len(head)]

    def finish(self) -> None: ...


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Seconds that ``work(0) … work(count - 1)`` take on :data:`CONNECTIONS` threads."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda _: None, range(CONNECTIONS)))
        start = time.perf_counter()
        list(pool.map(work, range(count)))
        return time.perf_counter() - start


def reference(server: RedisServer, command: str, size: int, count: int) -> float:
    """GB/s of ``redis-benchmark``."""
    arguments = ["-p", str(server.port), "-t", command, "-d", str(size), "-n", str(count), "-c", str(CONNECTIONS)]
    done = subprocess.run(
        ["redis-benchmark", *arguments, "-r", str(KEYS), "--csv"], capture_output=True, text=True, check=True
    )
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    return float(row["rps"]) * size / 1e9


def measure(server: RedisServer, size: int, rounds: int) -> dict[str, list[float]]:
    """GB/s by what was measured, one figure a round."""
    count = BYTES // size
    store = RedisStore(server.url, StoreOptions(connections=CONNECTIONS))
    client = redis.Redis.from_url(server.url)
    head, payload = memoryview(os.urandom(4096)), memoryview(bytearray(os.urandom(size - 4096)))
    whole = bytes(head) + bytes(payload)
    rooms = [memoryview(bytearray(size)) for _ in range(count)]
    names = [f"benchmark/{index % KEYS}" for index in range(count)]
    ours = {
        "put": lambda at: store.put([Value(names[at], (head, payload))], 60),
        "get": lambda at: store.get([Wanted(names[at], Into(rooms[at]))], 60),
    }
    theirs = {"put": lambda at: client.set(names[at], whole), "get": lambda at: client.get(names[at])}
    figures: defaultdict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):  # the first one warms up
        for what, command in (("put", "set"), ("get", "get")):
            results = {
                f"{what} redis-benchmark": reference(server, command, size, count),
                f"{what} ours": size * count / in_threads(count, ours[what]) / 1e9,
                f"{what} redis-py": size * count / in_threads(count, theirs[what]) / 1e9,
            }
            if what == "get":
                assert bytes(rooms[0][: size - 4096]) == bytes(payload)
            for name, figure in results.items() if round_ else ():
                figures[name].append(figure)
    client.flushall()
    client.close()
    store.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    table = Table(title=f"Redis on this machine, {CONNECTIONS} connections: GB/s", title_justify="left")
    for name in ("value", "", "redis-benchmark", "ours", "of it", "redis-py"):
        table.add_column(name, justify="left" if not name else "right")
    every = {}
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        for size in (1 << 20, 4 << 20, 16 << 20):
            figures = every[size] = measure(server, size, given.rounds)
            for what in ("put", "get"):
                ratio = median(
                    ours / theirs
                    for ours, theirs in zip(figures[f"{what} ours"], figures[f"{what} redis-benchmark"], strict=True)
                )
                cells = [f"{median(figures[f'{what} {who}']):.2f}" for who in ("redis-benchmark", "ours", "redis-py")]
                table.add_row(f"{size >> 20} MiB", what, *cells[:2], f"{ratio:.0%}", cells[2])
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
