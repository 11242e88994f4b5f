"""Clients that ask all the time, and what they saw."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.servers import Server
from demo.conversation import DOCUMENT, Answer
from demo.rag import INSTRUCTION, WITHOUT_CACHE
from demo.vllm_chat import ask

PARTS = [part.strip() for part in re.split(r"\n(?=Part )", DOCUMENT.read_text())[1:]]
QUESTIONS = ("How long is the north pier?", "What is the storm signal?", "Who is the harbour master?")
EXACT, BLENDED, COMPUTED = "exact", "blended", "computed"
PARAMS: dict[str, dict[str, Any]] = {EXACT: {"lmcache.blend": False}, BLENDED: {}, COMPUTED: WITHOUT_CACHE}
WEIGHTS = (6, 2, 1)


@dataclass(frozen=True, order=True)
class Stall:
    """What a request lost to us, in seconds: ``wait`` for the cache, and in ``hooks`` of the engine's loop besides."""

    seconds: float
    wait: float
    hooks: float
    way: str
    while_: str

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s: {self.wait:.2f} waiting, {self.hooks:.2f} in hooks ({self.way}, {self.while_})"


@dataclass
class Seen:
    """``seconds`` to the first token, and ``over``, how much longer than the same prompt took before anything was
    broken; by way. ``stalls`` are what the servers themselves have measured."""

    served: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cut_off: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in PARAMS})
    over: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: {way: [] for way in PARAMS})
    stalls: list[Stall] = field(default_factory=list)
    untold: int = 0
    """Replies that say nothing of it."""
    tiers: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0


class Clients:
    """One for each server. Those requests that go without the cache tell what the machine alone does to a request."""

    def __init__(self, servers: Sequence[Server], seed: int) -> None:
        self.seen = Seen()
        self.happening = "nothing"
        """What is being done to the servers, for the log of slow requests."""
        self._servers = servers
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._expected: dict[str, str] = {}
        self._alone: dict[str, float] = {}
        choose = random.Random(seed)
        self._prompts = [
            ("\n\n".join(choose.sample(PARTS, choose.randint(1, 3))), choose.choice(QUESTIONS)) for _ in range(16)
        ]

    def learn(self) -> None:
        """What is right, and how long it takes."""

        def ask_all(server: Server) -> list[Answer]:
            return [_ask(server, text, question, COMPUTED) for text, question in self._prompts]

        with ThreadPoolExecutor() as pool:
            by_server = list(pool.map(ask_all, self._servers))
        for (text, question), answers in zip(self._prompts, zip(*by_server, strict=True), strict=True):
            assert len({answer.text for answer in answers}) == 1
            self._expected[text + question] = answers[0].text
            self._alone[text + question] = max(answer.seconds_to_first_token for answer in answers)

    def start(self) -> None:
        self._threads = [
            threading.Thread(target=self._client, args=(server, number), daemon=True)
            for number, server in enumerate(self._servers)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def _client(self, server: Server, number: int) -> None:
        choose = random.Random(number)
        while not self._over.is_set():
            server.is_up.wait(300)
            text, question = choose.choice(self._prompts)
            way = choose.choices(list(PARAMS), weights=WEIGHTS)[0]
            with server.requests:
                if server.is_up.is_set():
                    self._request(server, text, question, way)
            time.sleep(0.01)

    def _request(self, server: Server, text: str, question: str, way: str) -> None:
        kills, before = server.kills, self.happening
        try:
            answer = _ask(server, text, question, way)
        except httpx.HTTPError as error:
            with self._lock:
                if server.kills != kills or not server.is_up.is_set():
                    self.seen.cut_off += 1
                else:
                    self.seen.failed.append(f"{server.name}: {error!r}")
            time.sleep(0.2)
            return
        with self._lock:
            seen = self.seen
            seen.served[way] += 1
            seen.prompt_tokens += answer.prompt_tokens
            seen.tiers.update(answer.tokens_by_tier)
            expected = self._expected[text + question]
            if way != BLENDED and answer.text != expected:
                seen.wrong.append(f"{server.name}, {way}: {answer.text!r} for {expected!r}")
            seen.seconds[way].append(answer.seconds_to_first_token)
            while_ = f"{server.name}, {before} … {self.happening}"
            if answer.milliseconds:
                wait, hooks = (answer.milliseconds[part] / 1000 for part in ("wait", "hooks"))
                seen.stalls.append(Stall(wait + hooks, wait, hooks, way, while_))
            else:
                seen.untold += 1
            seen.over[way].append((answer.seconds_to_first_token - self._alone[text + question], while_))


def _ask(server: Server, text: str, question: str, way: str) -> Answer:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": f"{text}\n\n{question}"}]
    assert server.running is not None
    return ask(server.running.url, question, messages, params=PARAMS[way])
