"""A real SGLang server whose HiCache has our storage backend behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.sglang.server import ARGUMENTS, SLEEP_ON_IDLE
from tests.sglang.prepared_server import PreparedServer
from tests.sglang.server import MODEL, Server

MODULE = "tests.sglang.hicache.launch"
PAGE = 16
BACKEND = {
    "backend_name": "lmcache",
    "module_path": "lmcache.integration.sglang.hicache_storage",
    "class_name": "LMCacheHiCacheStorage",
    "interface_v1": 1,
    "prefetch_threshold": PAGE,  # SGLang asks its storage for nothing shorter; 256 where nobody tests
}
HICACHE = [
    *("--enable-hierarchical-cache", "--hicache-storage-backend", "dynamic", "--hicache-ratio", "2"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--hicache-write-policy", "write_through", "--hicache-storage-prefetch-policy", "wait_complete"),
]


@contextmanager
def hicache_server(folder: Path, disk: Path | None, *, pool_tokens: int = 1024) -> Iterator[Server]:
    """A ready server. ``folder`` takes its log; without ``disk`` it has no HiCache at all."""
    flags = ["--model-path", str(MODEL), *ARGUMENTS, SLEEP_ON_IDLE, "--dtype", "float32", "--page-size", str(PAGE)]
    flags += ["--context-length", "1024", "--max-total-tokens", str(pool_tokens), "--max-running-requests", "4"]
    if disk is not None:
        ours = {"lmcache.local_disk": str(disk), "lmcache.max_local_disk_size": 1, "lmcache.max_local_cpu_size": 0.2}
        flags += [*HICACHE, "--hicache-storage-backend-extra-config", json.dumps({**BACKEND, **ours})]
    log = folder / "sglang.log"
    with PreparedServer(MODULE, flags, {}, log) as process:
        process.wait_until_ready(lambda line: None, timeout=400)
        yield Server(process, log)
