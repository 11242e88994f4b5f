"""usage: python -m demo.fleet --model FOLDER. Two vLLM servers share a Redis, which is killed and comes back.

Exits with 1 if a request fails, an exact text differs, or nothing was reused across servers.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.markup import escape

from demo.conversation import DOCUMENT, SERVED_NAME, Answer, warm_up
from demo.fleet.redis_server import RedisMissingError, RedisServer
from demo.fleet.report import FleetResult, Row
from demo.options import Options, parse
from demo.rag import INSTRUCTION, WITHOUT_CACHE
from demo.screen import console, started
from demo.server import ServerFailedError
from demo.vllm_chat import ask
from demo.vllm_server import VLLMServer

CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
EXACT = {"lmcache.blend": False}
PARTS = re.split(r"\n(?=Part )", DOCUMENT.read_text())
FIRST, SECOND = (1, 2, 3), (4, 5, 6)
SHUFFLED, AWAY, AFTER = (6, 4, 5), (3, 6), (5, 2, 4)


@contextmanager
def running_server(title: str, options: Options, redis: RedisServer) -> Iterator[str]:
    """A ready and warmed-up server on that Redis; gives its address."""
    arguments = [
        *("--model", str(options.model), "--served-model-name", SERVED_NAME),
        *("--dtype", options.dtype, "--max-model-len", "4096", "--enforce-eager"),
        "--no-enable-prefix-caching",  # so that all reuse that is shown is ours
        "--enable-per-request-metrics",
        *("--kv-transfer-config", json.dumps(CONNECTOR)),
    ]
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LMCACHE_REMOTE_URL": redis.url,
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
        "LMCACHE_CHUNK_SIZE": "64",
        "LMCACHE_ENABLE_BLENDING": "true",
        "LMCACHE_BLEND_MIN_TOKENS": "128",
    }
    server = VLLMServer(arguments, environment, options.log)
    with started(title, server):
        warm_up(partial(ask, server.url, params=WITHOUT_CACHE))
        yield server.url


class Fleet:
    """Asks its two servers questions over parts of the handbook, and notes what came from where."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self.rows: list[Row] = []

    def ask(self, step: str, server: str, question: str, parts: tuple[int, ...], params: dict[str, Any]) -> Answer:
        documents = "\n\n".join(PARTS[part].strip() for part in parts)
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"{documents}\n\n{question}"},
        ]
        answer = ask(self._urls[server], question, messages, params=params)
        self.rows.append(Row(step, server, parts, answer))
        where = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in answer.tokens_by_tier.items() if tokens)
        figures = (
            f"{answer.seconds_to_first_token:.2f} s, {answer.prompt_tokens:,} tokens{', ' + where if where else ''}"
        )
        console.print(f"  {server}: [cyan]{question}[/cyan] parts {', '.join(map(str, parts))}  [dim]{figures}")
        console.print(f"    {escape(answer.text.strip())}")
        return answer


def run(options: Options) -> FleetResult:
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        redis = running.enter_context(RedisServer(folder))
        console.print(f"[bold]Redis:[/bold] {redis.url}")
        urls = {
            name: running.enter_context(running_server(f"Starting vLLM {name}", options, redis)) for name in ("A", "B")
        }
        fleet = Fleet(urls)

        console.print("\n[bold]A reads a document. B has never seen it")
        pier, storm = "How long is the north pier?", "What is the storm signal?"
        computed = fleet.ask("without the cache", "A", pier, FIRST, WITHOUT_CACHE)
        fleet.ask("computed and kept", "A", pier, FIRST, {})
        fleet.ask("computed and kept", "A", storm, SECOND, {})
        redis.wait_until_quiet()  # writes go on behind the answer
        prefix = fleet.ask("the same prompt", "B", pier, FIRST, EXACT)
        passages = fleet.ask("another order: CacheBlend", "B", storm, SHUFFLED, {})

        console.print("\n[bold]Redis is killed. Both go on")
        redis.kill()
        lighthouse = "What does the lighthouse stand on?"
        fleet.ask("Redis is away", "A", lighthouse, AWAY, EXACT)
        fleet.ask("Redis is away", "B", lighthouse, AWAY, {})
        fleet.ask("Redis is away", "B", pier, FIRST, EXACT)

        console.print("\n[bold]Redis is back, and empty")
        redis.start()
        back = ask_until_shared(fleet, redis)
    problems = []
    if prefix.text != computed.text:
        problems.append(f"B says {prefix.text!r} from A's prefix, without it is {computed.text!r}")
    for what, answer in (("the prefix", prefix), ("the passages", passages), ("what A kept after the outage", back)):
        if answer.tokens_by_tier.get("remote", 0) < answer.prompt_tokens / 3:
            problems.append(f"B got {answer.tokens_by_tier} of {what}, a prompt of {answer.prompt_tokens} tokens")
    return FleetResult(fleet.rows, problems)


def ask_until_shared(fleet: Fleet, redis: RedisServer) -> Answer:
    """A keeps something new, and what it could not write while Redis was away when that is asked for again."""
    fare = "How many passengers does the ferry carry?"
    fleet.ask("Redis is back", "A", fare, AFTER, {**EXACT, "lmcache.skip_load": True})
    for _ in range(5):
        before = redis.num_keys()
        fleet.ask("asked again", "A", fare, AFTER, EXACT)
        redis.wait_until_quiet()
        if redis.num_keys() == before > 0:
            break
    return fleet.ask("the same prompt", "B", fare, AFTER, EXACT)


def main() -> int:
    options = parse("python -m demo.fleet", __doc__, work=".cache/demo-fleet")
    try:
        result = run(options)
    except RedisMissingError as error:
        console.print(f"[red bold]The demo cannot start:[/] {escape(str(error))}")
        return 1
    except (ServerFailedError, httpx.HTTPError) as error:
        console.print(f"[red bold]The demo could not go on:[/] {escape(str(error))}")
        console.print(f"The servers' whole log is {options.log}")
        return 1
    (options.work / "result.json").write_text(json.dumps([asdict(row) for row in result.rows], indent=1))
    console.print()
    console.print(result.table())
    console.print(f"[dim]Log and figures: {options.work}")
    for problem in result.problems:
        console.print(f"[red bold]Wrong:[/] {escape(problem)}")
    return bool(result.problems)


if __name__ == "__main__":
    sys.exit(main())
