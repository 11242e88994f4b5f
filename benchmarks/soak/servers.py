"""The servers under soak."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.soak.clocks import WallClock
from demo.conversation import SERVED_NAME, warm_up
from demo.rag import WITHOUT_CACHE
from demo.vllm_chat import ask
from demo.vllm_server import VLLMServer

DISK_MB = 192
REMOTE_LOOKUP_SECONDS, REMOTE_TIMEOUT_SECONDS, MAX_DISK_WAIT_SECONDS = 0.2, 2, 3
DEADLINE = REMOTE_LOOKUP_SECONDS + MAX_DISK_WAIT_SECONDS
"""How long a request may wait for us: for what the store holds, and then for its bytes."""
_PRELOAD = Path(__file__).with_name("preload")


@dataclass
class Server:
    """A vLLM with a disk and a wall clock of its own."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    disk: Path
    clock: WallClock
    asked: Path
    has_small_disk: bool
    running: VLLMServer | None = None
    kills: int = 0
    longest_hooks: dict[str, float] = field(default_factory=dict)
    """Seconds of the longest single call of each hook, of all runs that were asked before they were killed."""
    is_up: threading.Event = field(default_factory=threading.Event)
    requests: threading.Lock = field(default_factory=threading.Lock)
    """Held by a client while it asks."""

    def start(self) -> None:
        self.running = VLLMServer(self.command, self.environment, self.log)
        self.running.__enter__()
        self.running.wait_until_ready(lambda line: None)
        warm_up(partial(ask, self.running.url, params=WITHOUT_CACHE))
        self.is_up.set()

    def kill(self) -> None:
        self.is_up.clear()
        self.kills += 1
        if self.running is not None:
            self.running.kill()

    def leaked(self, seconds: float = 30) -> dict[str, int]:
        """Pins, and references besides the memory tier's own, that are still there after so long without a request."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.look()
            if time.monotonic() > deadline or (found is not None and not found["pins"] and not found["references"]):
                return found or {"not told": 1}
            time.sleep(1)

    def look(self) -> dict[str, int] | None:
        """Pins and references now; None from a server that does not tell."""
        for old in self.asked.parent.glob(f"{self.asked.name}.*"):
            old.unlink()
        self.asked.touch()
        os.utime(self.asked)
        for _ in range(100):
            time.sleep(0.2)
            for told in self.asked.parent.glob(f"{self.asked.name}.[0-9]*"):
                with suppress(ValueError):
                    counts = json.loads(told.read_text())
                    for hook, seconds in counts["longest hooks"].items():
                        self.longest_hooks[hook] = max(seconds, self.longest_hooks.get(hook, 0.0))
                    return {name: counts[name] for name in ("pins", "references")}
        return None


def small_disk(running: ExitStack, folder: Path) -> bool:
    """Whether ``folder`` is a file system of its own now, so that it can be full."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return False
    running.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
    return True


def start_server(name: str, running: ExitStack, work: Path, model: Path, redis_url: str) -> Server:
    folder = work / f"disk-{name}"
    has_small_disk = small_disk(running, folder)
    disk, clock, asked = folder / "kv", WallClock(work / f"{name}.clock"), work / f"{name}.held"
    environment = {
        "LMCACHE_REMOTE_URL": redis_url,
        "LMCACHE_REMOTE_LOOKUP_SECONDS": str(REMOTE_LOOKUP_SECONDS),
        "LMCACHE_REMOTE_TIMEOUT_SECONDS": str(REMOTE_TIMEOUT_SECONDS),
        "LMCACHE_MAX_DISK_WAIT_SECONDS": str(MAX_DISK_WAIT_SECONDS),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1",
        "LMCACHE_LOCAL_DISK": str(disk),
        "LMCACHE_MAX_LOCAL_DISK_SIZE": str(DISK_MB / 1024 * 0.8),
        "LMCACHE_CHUNK_SIZE": "64",
        "LMCACHE_ENABLE_BLENDING": "true",
        "LMCACHE_BLEND_MIN_TOKENS": "128",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "SOAK_HELD": str(asked),
        "PYTHONPATH": os.pathsep.join([str(_PRELOAD), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **clock.environment,
    }
    command = [
        *("--model", str(model), "--served-model-name", SERVED_NAME, "--dtype", "float32", "--max-model-len", "4096"),
        *("--enforce-eager", "--no-enable-prefix-caching", "--enable-per-request-metrics"),
        *("--kv-transfer-config", json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})),
    ]
    server = Server(name, command, environment, work / f"{name}.log", disk, clock, asked, has_small_disk)
    running.callback(server.kill)
    server.start()
    return server
