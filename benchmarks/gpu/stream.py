"""Many requests at once: vLLM's engine stepped in a loop, every token's time noted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.engine import Engine, report_of
from benchmarks.gpu.prompts import Tokens


@dataclass
class Request:
    """Times are of ``time.perf_counter``; None: not yet."""

    name: str
    arrival: float
    tokens: int = 0
    first: float | None = None
    last: float | None = None
    cached_tokens: int = 0
    report: dict[str, Any] | None = None


class Stream:
    """Requests under way in ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._core = engine.core
        self._running: dict[str, Request] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._running)

    def add(
        self, prompt: Tokens, max_tokens: int, params: dict[str, Any] | None = None, arrival: float | None = None
    ) -> Request:
        """``arrival`` is when it should have come; a loop that is late then makes the request look late, as it was."""
        from vllm.sampling_params import RequestOutputKind

        sampling = self._engine.sampling(max_tokens, params)
        sampling.output_kind = RequestOutputKind.DELTA
        request = Request(f"request-{self._number}", time.perf_counter() if arrival is None else arrival)
        self._number += 1
        self._running[request.name] = request
        self._core.add_request(request.name, {"prompt_token_ids": prompt}, sampling)
        return request

    def step(self) -> None:
        """One step of the engine."""
        outputs = self._core.step()
        now = time.perf_counter()
        for output in outputs:
            request = self._running.get(output.request_id)
            if request is None:
                continue
            new = len(output.outputs[0].token_ids)
            request.tokens += new
            if new and request.first is None:
                request.first = now
            if output.finished:
                request.last = now
                request.cached_tokens = output.num_cached_tokens or 0
                request.report = report_of(output)
                del self._running[request.name]

    def drain(self) -> None:
        while self._running:
            self.step()
        self._engine.settle()

    def abort(self) -> None:
        """Give up what is under way."""
        self._core.abort_request(list(self._running))
        self._running.clear()
        self._engine.settle()
