"""A real SGLang server for the tests, on the CPU, with the small real model.

``sgl.Engine`` in the test's own process starts no faster, and its crash would take the tests along.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from demo.sglang.server import SGLangServer

REPOSITORY = Path(__file__).parents[2]
MODEL = Path(os.environ.get("SMOLLM2_PATH", REPOSITORY / ".cache" / "models" / "smollm2-bfloat16"))


@dataclass(frozen=True)
class Generation:
    """``own``: prompt tokens from SGLang's own cache; ``storage``: from us. ``reason``: why it ended.

    ``retractions``: how often SGLang took back the slots of this request, and let it wait for others.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    own: int
    storage: int
    reason: str
    retractions: int = 0


class Server:
    """A running server; :func:`sglang_server` makes them."""

    def __init__(self, process: SGLangServer, log: Path) -> None:
        self._process = process
        self._log = log
        self.url = process.url

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 16,
        salt: str | None = None,
        extra_key: str | None = None,
        request_id: str | None = None,
        timeout: float = 300,
        **sampling: Any,
    ) -> Generation:
        """Greedy unless ``sampling`` says otherwise; goes on behind an end-of-text token, so that lengths are known."""
        asked = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        keys = {"cache_salt": salt, "extra_key": extra_key, "rid": request_id}
        parameters = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True, **sampling}
        body = {**asked, **{name: value for name, value in keys.items() if value is not None}}
        response = httpx.post(f"{self.url}/generate", json={**body, "sampling_params": parameters}, timeout=timeout)
        assert response.is_success, f"{response.status_code}: {response.text}\n{self._process.log_tail()}"
        reply = response.json()
        meta = reply["meta_info"]
        cached = meta.get("cached_tokens_details") or {}
        return Generation(
            text=reply["text"],
            tokens=reply["output_ids"],
            prompt_tokens=meta.get("prompt_tokens", 0),  # of an aborted request nothing is told
            own=cached.get("device", 0),
            storage=cached.get("storage", 0),
            reason=(meta["finish_reason"] or {}).get("type", ""),
            retractions=meta.get("num_retractions") or 0,
        )

    def flush(self) -> None:
        """Empty SGLang's own cache; what we keep stays."""
        self._process.flush()

    def clear_storage(self) -> None:
        """Empty our tiers, through SGLang's ``/hicache/storage-backend/clear``."""
        httpx.post(f"{self.url}/hicache/storage-backend/clear", timeout=60).raise_for_status()

    def abort(self, request_id: str = "", *, everything: bool = False) -> None:
        body = {"rid": request_id, "abort_all": everything}
        httpx.post(f"{self.url}/abort_request", json=body, timeout=30).raise_for_status()

    def is_healthy(self) -> bool:
        """Whether SGLang still computes: it generates one token."""
        try:
            return httpx.get(f"{self.url}/health_generate", timeout=60).is_success
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str, timeout: float = 30) -> None:
        """Until the log holds ``text``; AssertionError otherwise."""
        deadline = time.monotonic() + timeout
        while text not in self.log():
            assert time.monotonic() < deadline, f"{text!r} did not come up:\n{self._process.log_tail()}"
            time.sleep(0.1)


@contextmanager
def sglang_server(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    model: Path = MODEL,
    dtype: str = "float32",
    page_size: int = 1,
    lmcache: bool = True,
    chunk_size: int = 16,
) -> Iterator[Server]:
    """A server that is ready. Its processes are ended with the block, whatever happens in it.

    ``folder`` takes the log. ``config``: our options (``{"local_disk": …}``), which nothing in the environment of the
    tests changes. ``lmcache=False`` is the negative control: the same SGLang without us.
    """
    options = {"chunk_size": chunk_size, "max_local_cpu_size": 0.5, **(config or {})}
    variables: dict[str, str | None] = {name: None for name in os.environ if name.startswith("LMCACHE_")}
    variables |= {f"LMCACHE_{name.upper()}": _spelled(value) for name, value in options.items()}
    variables |= {"PYTHONPATH": str(REPOSITORY / "src"), **(environment or {})}
    flags = ["--dtype", dtype, "--page-size", str(page_size), "--context-length", "4096"]
    flags += ["--max-total-tokens", "16384", "--max-running-requests", "8", "--random-seed", "1", *arguments]
    log = folder / "sglang.log"
    with SGLangServer(model, flags, variables, log, lmcache=lmcache) as process:
        process.wait_until_ready(lambda line: None, timeout=300)
        yield Server(process, log)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
