"""usage: python -m demo.sglang --model FOLDER. Exits with 1 if a text differs or nothing was reused."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.markup import escape

from demo.conversation import SERVED_NAME, Answer, Ask, warm_up
from demo.options import Options, parse
from demo.rag import ENVIRONMENT as BLENDING
from demo.rag import RagResult, ask_in_all_ways
from demo.report import SGLANG, Result
from demo.screen import console, hold_aloud, started
from demo.server import ServerFailedError
from demo.sglang.chat import ask
from demo.sglang.server import SGLangServer

PAGE_TOKENS = 1
POOL_TOKENS = 16_384  # of SGLang's own cache: enough for each pass over the questions


@contextmanager
def running_server(title: str, options: Options, environment: dict[str, str]) -> Iterator[SGLangServer]:
    """A ready and warmed-up server."""
    arguments = [
        *("--served-model-name", SERVED_NAME, "--dtype", options.dtype, "--context-length", "4096"),
        *("--max-total-tokens", str(POOL_TOKENS), "--page-size", str(PAGE_TOKENS)),
    ]
    server = SGLangServer(options.model, arguments, environment, options.log)
    with started(title, server):
        warm_up(partial(ask, server.url, salt="warm-up"))
        yield server


def computing(url: str) -> Ask:
    """Each question with a salt of its own: neither SGLang's cache nor ours may serve it."""

    def ask_alone(question: str, messages: list[dict[str, str]]) -> Answer:
        return ask(url, question, messages, salt=f"alone-{len(messages)}")

    return ask_alone


def flushed(server: SGLangServer) -> Ask:
    """SGLang's own cache is emptied before each question: all that is reused is ours."""

    def ask_flushed(question: str, messages: list[dict[str, str]]) -> Answer:
        server.flush()
        return ask(server.url, question, messages)

    return ask_flushed


def run(options: Options) -> Result:
    with tempfile.TemporaryDirectory(dir=options.work.resolve(), prefix="disk-") as disk:
        environment = {
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "2",
            "LMCACHE_LOCAL_DISK": disk,
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "4",
        }
        with running_server("Starting SGLang", options, environment) as server:
            cold = hold_aloud("Nothing reused: SGLang computes every prompt", computing(server.url))
            texts = [answer.text for answer in cold]
            first_held = hold_aloud("The same conversation as SGLang holds it", partial(ask, server.url), texts)
            from_memory = hold_aloud("The same questions, SGLang's own cache emptied each time", flushed(server), texts)
        console.print()
        # Without the memory tier every question shows the disk, as in the vLLM demo.
        environment["LMCACHE_LOCAL_CPU"] = "false"
        with running_server("Restarting SGLang, with the memory tier off", options, environment) as server:
            from_disk = hold_aloud("The same questions after the restart", flushed(server), texts)
    return Result(cold, first_held, from_memory, from_disk, SGLANG)


def run_rag(options: Options) -> RagResult:
    """SGLang's own cache is emptied before each question: it would be as good as ours where the same way asks again."""
    environment = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1", "LMCACHE_LOG_LEVEL": "DEBUG", **BLENDING}
    console.print()
    with running_server("Starting SGLang with CacheBlend", options, environment) as server:
        console.print("\n[bold]Questions over six documents, chosen and ordered anew each time")
        names = count()

        def ask_flushed(question: str, messages: list[dict[str, str]], *, params: dict[str, Any], salt: str) -> Answer:
            server.flush()
            name = f"rag-{next(names)}"
            answer = ask(server.url, question, messages, salt=salt, params=params, request_id=name)
            return replace(answer, recomputed_tokens=_recomputed(options.log, name))

        result = RagResult(list(ask_in_all_ways(ask_flushed)))
    console.print()
    console.print(result.table())
    return result


def _recomputed(log: Path, request_id: str) -> int:
    """SGLang's replies have no place for it."""
    said = re.search(rf"CacheBlend of {request_id}: .* (\d+) recomputed", log.read_text(errors="replace"))
    return int(said[1]) if said else 0


def own_cache_ratio(result: Result) -> float:
    """What reuse can bring at best in this SGLang: after its first question it held the prompts in its own cache."""
    pairs = list(zip(result.cold, result.first_held, strict=True))[1:]
    return median(cold.seconds_to_first_token / held.seconds_to_first_token for cold, held in pairs)


def main() -> int:
    options = parse("python -m demo.sglang", __doc__, work=".cache/demo-sglang")
    try:
        result = run(options)
        rag = run_rag(options)
    except (ServerFailedError, TimeoutError, httpx.HTTPError) as error:
        console.print(f"[red bold]The demo could not go on:[/] {escape(str(error))}")
        console.print(f"The server's whole log is {options.log}")
        return 1
    result.write(options.work / "result.json", dtype=options.dtype)

    console.print()
    console.print(result.table())
    console.print(result.summary(options.dtype))
    # Its torch_native attention computes a row for every token of the prompt, reused ones too.
    console.print(
        f"SGLang's own cache brought it {own_cache_ratio(result):.1f} times sooner: "
        "its attention for CPUs gains no more."
    )
    console.print(f"[dim]Log and figures: {options.work}")
    console.print(
        f"With CacheBlend the first token came {rag.median_ratio():.1f} times sooner where every document was known "
        f"(median); its text may differ: it is an approximation."
    )
    problems = [*result.problems(), *rag.problems()]
    for problem in problems:
        console.print(f"[red bold]Wrong:[/] {escape(problem)}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
