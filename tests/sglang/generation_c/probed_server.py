"""A real SGLang server whose connector can be looked into, and made to fail."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from demo.sglang.server import ARGUMENTS, SLEEP_ON_IDLE, SGLangServer
from tests.sglang.prepared_server import PreparedServer
from tests.sglang.server import MODEL, Server

MODULE = "tests.sglang.generation_c.probed_launch"


@dataclass(frozen=True)
class Aborted:
    """What came before a request was aborted; ``reason``: why it ended."""

    tokens: list[int]
    reason: str


class ProbedServer(Server):
    """See :func:`probed_server`."""

    def __init__(self, process: SGLangServer, log: Path, folder: Path) -> None:
        super().__init__(process, log)
        self._folder = folder

    def generate_and_abort(self, prompt: str, request_id: str, after: float, *, salt: str | None = None) -> Aborted:
        """Ask for 100 tokens, and abort that ``after`` seconds: in the queue, while it loads, or later."""
        parameters = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
        body = {"text": prompt, "rid": request_id, "cache_salt": salt, "sampling_params": parameters}
        with ThreadPoolExecutor(1) as other:
            response = other.submit(httpx.post, f"{self.url}/generate", json=body, timeout=300)
            time.sleep(after)
            while not response.done():  # SGLang forgets to abort what it does not know yet
                self.abort(request_id)
                time.sleep(0.1)
        reply = response.result().json()
        reason = (reply.get("meta_info", {}).get("finish_reason") or {}).get("type", "")
        return Aborted(reply.get("output_ids") or [], reason)

    def state(self, rank: int = 0) -> dict[str, Any]:
        """``open`` requests, ``leaks`` in words, ``metrics`` by name; of a server that has nothing to do."""
        answer = self._folder / f"state-{rank}"
        answer.unlink(missing_ok=True)
        (self._folder / f"ask-{rank}").touch()
        deadline = time.monotonic() + 30
        while not answer.exists():
            assert time.monotonic() < deadline, "the probe did not answer"
            time.sleep(0.05)
        state: dict[str, Any] = json.loads(answer.read_text())
        return state

    @contextmanager
    def failing(self, fault: str) -> Iterator[None]:
        """Let one of ``probe.FAULTS`` raise."""
        (self._folder / "fault").write_text(fault)
        try:
            yield
        finally:
            (self._folder / "fault").unlink()


@contextmanager
def probed_server(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    arguments: Sequence[str] = (),
    model: Path = MODEL,
    page_size: int = 1,
    lmcache: bool = True,
    sleeps_on_idle: bool = True,
) -> Iterator[ProbedServer]:
    """A ready server. ``folder`` takes its log and what the probe says; ``config`` are our options.

    Not to sleep on idle is SGLang's default, but each such server takes a core from those beside it.
    """
    for old in ("fault", "ask-0", "ask-1"):
        (folder / old).unlink(missing_ok=True)
    options = {"chunk_size": 16, "max_local_cpu_size": 0.5, **(config or {})}
    environment = {f"LMCACHE_{name.upper()}": _spelled(value) for name, value in options.items()}
    environment["PROBE_FOLDER"] = str(folder)
    flags = ["--model-path", str(model), *ARGUMENTS, "--dtype", "float32", "--page-size", str(page_size)]
    flags += ["--context-length", "4096", "--max-total-tokens", "8192", "--max-running-requests", "8", *arguments]
    flags += ["--enable-lmcache"] if lmcache else []
    flags += [SLEEP_ON_IDLE] if sleeps_on_idle else []
    log = folder / "sglang.log"
    with PreparedServer(MODULE, flags, environment, log) as process:
        process.wait_until_ready(lambda line: None, timeout=400)
        yield ProbedServer(process, log, folder)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
