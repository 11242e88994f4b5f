"""Two vLLM servers, a Redis and disks, while all of them fail at random; what the clients saw of it.

usage: python -m benchmarks.soak --model FOLDER [--minutes N] [--seed N] [--json FILE]

Clients ask both servers all the time. Every few seconds something happens: a server or Redis is killed and started
again, the network to Redis is cut or stalls for five seconds, bits flip in Redis and in files on disk, a disk is full.
Exits with 1 if an exact answer was wrong, or a request failed whose server was alive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import httpx
import redis as redis_client
from rich.console import Console
from rich.table import Table

from demo.conversation import DOCUMENT, SERVED_NAME, warm_up
from demo.fleet.redis_link import RedisLink
from demo.fleet.redis_server import RedisServer
from demo.rag import INSTRUCTION, WITHOUT_CACHE
from demo.vllm_chat import ask
from demo.vllm_server import VLLMServer

PARTS = [part.strip() for part in re.split(r"\n(?=Part )", DOCUMENT.read_text())[1:]]
QUESTIONS = ("How long is the north pier?", "What is the storm signal?", "Who is the harbour master?")
DISK_MB = 192
EXACT = {"lmcache.blend": False}
console = Console(highlight=False)


@dataclass
class Server:
    """A vLLM with a disk of its own."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    disk: Path
    running: VLLMServer | None = None
    kills: int = 0
    is_up: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.running = VLLMServer(self.command, self.environment, self.log)
        self.running.__enter__()
        self.running.wait_until_ready(lambda line: None)
        warm_up(partial(ask, self.running.url, params=WITHOUT_CACHE))
        self.is_up.set()

    def kill(self) -> None:
        assert self.running is not None
        self.is_up.clear()
        self.kills += 1
        self.running.kill()


@dataclass
class Seen:
    """By the clients."""

    served: int = 0
    exact: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cut_off: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tiers: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0


class Soak:
    def __init__(self, servers: list[Server], redis: RedisServer, link: RedisLink, seed: int) -> None:
        self.servers = servers
        self.redis = redis
        self.link = link
        self.random = random.Random(seed)
        self.seen = Seen()
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._expected: dict[str, str] = {}
        self._slowest: dict[str, float] = {}
        self._prompts = self._make_prompts()

    def _make_prompts(self) -> list[tuple[str, str]]:
        prompts = []
        for _ in range(16):
            parts = self.random.sample(PARTS, self.random.randint(1, 3))
            question = self.random.choice(QUESTIONS)
            prompts.append(("\n\n".join(parts), question))
        return prompts

    def run(self, minutes: float) -> None:
        """Learn what is right, then ask and break things."""
        for text, question in self._prompts:
            answers = [self._ask(server, text, question, WITHOUT_CACHE) for server in self.servers]
            assert len({answer.text for answer in answers}) == 1
            self._expected[text + question] = answers[0].text
            self._slowest[text + question] = max(answer.seconds_to_first_token for answer in answers)
        clients = [
            threading.Thread(target=self._client, args=(server, number), daemon=True)
            for number, server in enumerate(self.servers)
        ]
        for client in clients:
            client.start()
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(self.random.uniform(3, 8))
            self._break_something()
        time.sleep(10)
        self._over.set()
        for client in clients:
            client.join(120)

    def _ask(self, server: Server, text: str, question: str, params: dict[str, object]):  # type: ignore[no-untyped-def]
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": f"{text}\n\n{question}"}]
        assert server.running is not None
        return ask(server.running.url, question, messages, params=params)

    def _client(self, server: Server, number: int) -> None:
        choose = random.Random(number)
        while not self._over.is_set():
            server.is_up.wait(300)
            kills = server.kills
            text, question = choose.choice(self._prompts)
            blended = choose.random() < 0.25
            try:
                answer = self._ask(server, text, question, {} if blended else EXACT)
            except httpx.HTTPError as error:
                with self._lock:
                    if server.kills != kills or not server.is_up.is_set():
                        self.seen.cut_off += 1
                    else:
                        self.seen.failed.append(f"{server.name}: {error!r}")
                time.sleep(0.2)
                continue
            with self._lock:
                seen = self.seen
                seen.served += 1
                seen.prompt_tokens += answer.prompt_tokens
                seen.tiers.update(answer.tokens_by_tier)
                if not blended:
                    seen.exact += 1
                    if answer.text != self._expected[text + question]:
                        seen.wrong.append(f"{server.name}: {answer.text!r} for {self._expected[text + question]!r}")
                over = answer.seconds_to_first_token - self._slowest[text + question]
                seen.seconds.setdefault("to first token", []).append(answer.seconds_to_first_token)
                seen.seconds.setdefault("longer than computing it alone", []).append(over)

    def _break_something(self) -> None:
        faults = [
            self._kill_redis,
            self._cut_network,
            self._stall_network,
            self._pause_redis,
            self._flip_in_redis,
            self._flip_on_disk,
            self._fill_disk,
            self._kill_server,
        ]
        fault = self.random.choices(faults, weights=[2, 2, 2, 2, 3, 3, 2, 1])[0]
        name = fault.__name__.strip("_").replace("_", " ")
        self.faults[name] += 1
        console.print(
            f"[dim]{time.strftime('%H:%M:%S')} {name}; {self.seen.served} served, {len(self.seen.wrong)} wrong"
        )
        fault()

    def _kill_redis(self) -> None:
        self.redis.kill()
        time.sleep(self.random.uniform(1, 5))
        self.redis.start()

    def _cut_network(self) -> None:
        self.link.cut()
        time.sleep(5)
        self.link.mend()

    def _stall_network(self) -> None:
        self.link.stall()
        time.sleep(5)
        self.link.flow()

    def _pause_redis(self) -> None:
        self.redis.pause()
        time.sleep(5)
        self.redis.resume()

    def _flip_in_redis(self) -> None:
        with redis_client.Redis(unix_socket_path=str(self.redis.socket)) as client:
            for _ in range(20):
                key = client.randomkey()
                if key is None or client.type(key) != b"string":
                    continue
                at = self.random.randrange(max(1, client.strlen(key)))
                byte = client.getrange(key, at, at) or b"\0"
                client.setrange(key, at, bytes([byte[0] ^ (1 << self.random.randrange(8))]))

    def _flip_on_disk(self) -> None:
        for server in self.servers:
            files = list(server.disk.rglob("*.kv"))
            for path in self.random.sample(files, min(5, len(files))):
                with suppress(OSError), path.open("r+b") as file:
                    at = self.random.randrange(max(1, os.fstat(file.fileno()).st_size))
                    file.seek(at)
                    byte = file.read(1) or b"\0"
                    file.seek(at)
                    file.write(bytes([byte[0] ^ (1 << self.random.randrange(8))]))

    def _fill_disk(self) -> None:
        server = self.random.choice(self.servers)
        filler = server.disk.parent / "filler"
        with suppress(OSError), filler.open("wb") as file:
            for _ in range(4 * DISK_MB):
                file.write(b"x" * (1 << 18))
        time.sleep(5)
        filler.unlink(missing_ok=True)

    def _kill_server(self) -> None:
        server = self.random.choice(self.servers)
        server.kill()
        server.start()


def small_disk(running: ExitStack, folder: Path) -> Path:
    """A file system of its own, so that it can be full; without the right to mount one, a plain folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        running.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
    else:
        console.print("[yellow]no right to mount a file system: disks will not be full")
    return folder / "kv"


def start_server(name: str, running: ExitStack, work: Path, model: Path, link: RedisLink) -> Server:
    disk = small_disk(running, work / f"disk-{name}")
    environment = {
        "LMCACHE_REMOTE_URL": f"redis://127.0.0.1:{link.port}",
        "LMCACHE_REMOTE_TIMEOUT_SECONDS": "2",
        "LMCACHE_MAX_DISK_WAIT_SECONDS": "3",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1",
        "LMCACHE_LOCAL_DISK": str(disk),
        "LMCACHE_MAX_LOCAL_DISK_SIZE": str(DISK_MB / 1024 * 0.8),
        "LMCACHE_CHUNK_SIZE": "64",
        "LMCACHE_ENABLE_BLENDING": "true",
        "LMCACHE_BLEND_MIN_TOKENS": "128",
    }
    command = [
        *("--model", str(model), "--served-model-name", SERVED_NAME, "--dtype", "float32", "--max-model-len", "4096"),
        *("--enforce-eager", "--no-enable-prefix-caching", "--enable-per-request-metrics"),
        *("--kv-transfer-config", json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})),
    ]
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    server = Server(name, command, environment, work / f"{name}.log", disk)
    running.callback(lambda: server.running and server.running.kill())
    server.start()
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with ExitStack() as running:
        work = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True)))
        redis = running.enter_context(RedisServer(work, ["--maxmemory", "128mb", "--maxmemory-policy", "allkeys-lru"]))
        link = running.enter_context(RedisLink(redis.port))
        servers = [start_server(name, running, work, given.model.resolve(), link) for name in ("A", "B")]
        soak = Soak(servers, redis, link, given.seed)
        soak.run(given.minutes)
        tail = "\n".join(
            line for server in servers for line in server.log.read_text().splitlines() if "Traceback" in line
        )
    seen = soak.seen
    table = Table("", "", title=f"{given.minutes:g} minutes, {sum(soak.faults.values())} faults", show_header=False)
    for fault, count in sorted(soak.faults.items()):
        table.add_row(f"  {fault}", str(count))
    table.add_section()
    figures = {
        "requests served": seen.served,
        "of these exact": seen.exact,
        "wrong texts": len(seen.wrong),
        "failed although the server was alive": len(seen.failed),
        "cut off with their server": seen.cut_off,
        "tokens asked for": seen.prompt_tokens,
        **{f"tokens from {tier}": count for tier, count in seen.tiers.items()},
    }
    for name, seconds in seen.seconds.items():
        figures[f"seconds {name}, median"] = round(median(seconds), 2)
        figures[f"seconds {name}, 99th percentile"] = round(quantiles(seconds, n=100)[98], 2)
        figures[f"seconds {name}, longest"] = round(max(seconds), 2)
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,}")
    console.print(table)
    for problem in [*seen.wrong[:5], *seen.failed[:5], tail]:
        if problem:
            console.print(f"[red]{problem}")
    if given.json:
        given.json.write_text(json.dumps({"faults": soak.faults, **figures}, indent=1))
    return bool(seen.wrong or seen.failed)


if __name__ == "__main__":
    sys.exit(main())
