"""A real server of an older SGLang, from its unpacked sources, whose connector can be looked into."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from demo.server import EngineServer, _free_port
from demo.sglang.server import SHIMS, SLEEP_ON_IDLE, SGLangServer
from tests.sglang.generation_ab.old_sglang import source
from tests.sglang.generation_c.probed_server import ProbedServer, _spelled
from tests.sglang.server import MODEL, REPOSITORY
from tests.shallow_model import shallow_copy

MODULE = "tests.sglang.engine_ab.launch"
ARGUMENTS = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-piecewise-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup"),
    *("--dtype", "float32", "--context-length", "1024", "--max-running-requests", "8", "--random-seed", "1"),
    *("--mem-fraction-static", "0.3", "--watchdog-timeout", "900", SLEEP_ON_IDLE),
]


class OldServer(ProbedServer):
    """These versions say how many prompt tokens were not computed, but not where they came from."""

    def cached(self, prompt: str, max_tokens: int) -> tuple[list[int], int, int]:
        """The answer, and of how many prompt tokens how many were computed before, by SGLang's or our account."""
        parameters = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        response = httpx.post(f"{self.url}/generate", json={"text": prompt, "sampling_params": parameters}, timeout=300)
        assert response.is_success, f"{response.status_code}: {response.text}\n{self._process.log_tail()}"
        reply = response.json()
        meta = reply["meta_info"]
        return reply["output_ids"], meta["cached_tokens"], meta["prompt_tokens"]


class _Process(SGLangServer):
    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        EngineServer.__init__(self, MODULE, arguments, environment, log)


@contextmanager
def old_server(
    folder: Path,
    version: str,
    config: Mapping[str, Any] | None = None,
    *,
    pool_tokens: int = 4096,
    lmcache: bool = True,
) -> Iterator[OldServer]:
    """A ready server of SGLang ``version``, with :mod:`tests.shallow_model`.

    ``folder`` takes its log and what the probe says; ``config``: our options.
    ``pool_tokens``: the size of SGLang's own cache.
    """
    for old in ("ask-0", "state-0"):
        (folder / old).unlink(missing_ok=True)
    options = {"chunk_size": 16, "max_local_cpu_size": 0.5, **(config or {})}
    environment = {f"LMCACHE_{name.upper()}": _spelled(value) for name, value in options.items()}
    paths = [SHIMS, REPOSITORY / "src", REPOSITORY, source(version)]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    environment |= {"PROBE_FOLDER": str(folder), "OLD_SGLANG": version}
    if version == "0.5.12":  # else 10000 above the other, which may be too high; later versions would open it
        environment["SGLANG_GRPC_PORT"] = str(_free_port())
    flags = ["--model-path", str(shallow_copy(MODEL)), *ARGUMENTS, "--max-total-tokens", str(pool_tokens)]
    if lmcache:
        flags.append("--enable-lmcache")
        if version != "0.5.12":  # generation B insists on a file
            file = folder / "lmcache.yaml"
            file.write_text("mp_host: localhost\nmp_port: 5555\n")
            flags += ["--lmcache-config-file", str(file)]
    log = folder / "sglang.log"
    with _Process(flags, environment, log) as process:
        process.wait_until_ready(lambda line: None, timeout=400)
        yield OldServer(process, log, folder)
