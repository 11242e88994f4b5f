"""What happens to the servers, their disks, their clocks, Redis and the network between."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import redis as redis_client

from benchmarks.soak.network import Namespace
from benchmarks.soak.servers import DISK_MB, Server
from demo.fleet.redis_link import RedisLink
from demo.fleet.redis_server import RedisServer

SECONDS = 5
"""How long an outage or a stall lasts."""
_DAY = 86_400
_JUMPS = (-30 * _DAY, -3600, -60, 0, 60, 3600, 30 * _DAY)


class Faults:
    def __init__(
        self, servers: Sequence[Server], redis: RedisServer, link: RedisLink, namespace: Namespace, seed: int
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.leaked: list[str] = []
        self.left_out: list[str] = []
        """What cannot be done on this machine."""
        self.looked = 0
        """How often leaks were looked for."""
        self._servers, self._redis, self._link, self._namespace = servers, redis, link, namespace
        self._random = random.Random(seed)
        self._known: dict[str, tuple[Callable[[], None], int]] = {
            "Redis killed": (self._kill_redis, 2),
            "Redis stopped": (self._pause_redis, 2),
            "network cut": (self._cut_network, 2),
            "network stalled": (self._stall_network, 2),
            "packets lost": (self._lose_packets, 2),
            "bits flipped in Redis": (self._flip_in_redis, 3),
            "bits flipped on disk": (self._flip_on_disk, 3),
            "disk full": (self._fill_disk, 2),
            "clock jumped": (self._jump_clock, 2),
            "server killed": (self._kill_server, 1),
        }
        self._leave_out("packets lost", namespace.is_there, "no right to make a network namespace")
        self._leave_out("disk full", all(each.has_small_disk for each in servers), "no right to mount a file system")
        self._leave_out("clock jumped", all(each.clock.can_jump for each in servers), "no C compiler")

    def _leave_out(self, name: str, is_possible: bool, why: str) -> None:
        if not is_possible:
            del self._known[name]
            self.left_out.append(f"{name}: {why}")

    def choose(self) -> str:
        weights = [weight for _, weight in self._known.values()]
        return self._random.choices(list(self._known), weights)[0]

    def happen(self, name: str) -> None:
        """Returns when it is over."""
        self.counts[name] += 1
        self._known[name][0]()

    def look_for_leaks(self, server: Server) -> None:
        """Nobody asks ``server`` meanwhile."""
        with server.requests:
            self.looked += 1
            found = server.leaked()
            if any(found.values()):
                self.leaked.append(f"{server.name}: {found}")

    def _kill_redis(self) -> None:
        self._redis.kill()
        time.sleep(self._random.uniform(1, SECONDS))
        self._redis.start()

    def _pause_redis(self) -> None:
        self._redis.pause()
        time.sleep(SECONDS)
        self._redis.resume()

    def _cut_network(self) -> None:
        self._link.cut()
        time.sleep(SECONDS)
        self._link.mend()

    def _stall_network(self) -> None:
        self._link.stall()
        time.sleep(SECONDS)
        self._link.flow()

    def _lose_packets(self) -> None:
        self._namespace.lose_packets()
        time.sleep(SECONDS)
        self._namespace.deliver_packets()

    def _flip_in_redis(self) -> None:
        with redis_client.Redis(unix_socket_path=str(self._redis.socket)) as client:
            for _ in range(20):
                key = client.randomkey()
                if key is None or client.type(key) != b"string":
                    continue
                at = self._random.randrange(max(1, client.strlen(key)))
                byte = client.getrange(key, at, at) or b"\0"
                client.setrange(key, at, self._flipped(byte))

    def _flip_on_disk(self) -> None:
        for server in self._servers:
            files = list(server.disk.rglob("*.kv"))
            for path in self._random.sample(files, min(5, len(files))):
                with suppress(OSError), path.open("r+b") as file:
                    at = self._random.randrange(max(1, os.fstat(file.fileno()).st_size))
                    file.seek(at)
                    byte = file.read(1) or b"\0"
                    file.seek(at)
                    file.write(self._flipped(byte))

    def _flipped(self, byte: bytes) -> bytes:
        return bytes([byte[0] ^ (1 << self._random.randrange(8))])

    def _fill_disk(self) -> None:
        filler = self._random.choice(self._servers).disk.parent / "filler"
        with suppress(OSError), filler.open("wb") as file:
            for _ in range(4 * DISK_MB):
                file.write(b"x" * (1 << 18))
        time.sleep(SECONDS)
        filler.unlink(missing_ok=True)

    def _jump_clock(self) -> None:
        self._random.choice(self._servers).clock.jump_to(self._random.choice(_JUMPS))

    def _kill_server(self) -> None:
        """In the midst of what it does; it is first looked at, as its counts go with it, every other time when it is
        idle."""
        server = self._random.choice(self._servers)
        if self.counts["server killed"] % 2 == 0:
            self.look_for_leaks(server)
        else:
            server.look()
        server.kill()
        server.start()
