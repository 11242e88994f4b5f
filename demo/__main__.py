"""usage: python -m demo --model FOLDER. Exits with 1 if a text differs or nothing was reused."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx
from rich.markup import escape

from demo.conversation import SERVED_NAME, warm_up
from demo.options import Options, parse
from demo.rag import ENVIRONMENT as BLENDING
from demo.rag import WITHOUT_CACHE, RagResult, ask_in_all_ways
from demo.report import Result
from demo.screen import console, hold_aloud, started
from demo.server import ServerFailedError
from demo.vllm_chat import ask
from demo.vllm_server import VLLMServer

CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


@contextmanager
def running_server(title: str, options: Options, environment: dict[str, str]) -> Iterator[str]:
    """A ready and warmed-up server; gives its address."""
    arguments = [
        *("--model", str(options.model), "--served-model-name", SERVED_NAME),
        *("--dtype", options.dtype, "--max-model-len", "4096", "--enforce-eager"),
        "--no-enable-prefix-caching",  # so that all reuse that is shown is ours
        "--enable-per-request-metrics",
        *("--kv-transfer-config", json.dumps(CONNECTOR)),
    ]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    server = VLLMServer(arguments, environment, options.log)
    with started(title, server):
        warm_up(partial(ask, server.url, params=WITHOUT_CACHE))
        yield server.url


def run(options: Options) -> Result:
    with tempfile.TemporaryDirectory(dir=options.work.resolve(), prefix="disk-") as disk:
        environment = {
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
            "LMCACHE_LOCAL_DISK": disk,
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "2",
        }
        with running_server("Starting vLLM", options, environment) as url:
            without = partial(ask, url, params=WITHOUT_CACHE)
            cold = hold_aloud("Without the cache: vLLM computes every prompt", without)
            texts = [answer.text for answer in cold]
            first_held = hold_aloud("The same conversation with the cache", partial(ask, url), texts)
            from_memory = hold_aloud("The same questions again", partial(ask, url), texts)
        console.print()
        # What is read from disk is kept in memory as well, so the second question would find most of its prompt there.
        # Without the memory tier every question shows the disk.
        environment["LMCACHE_LOCAL_CPU"] = "false"
        with running_server("Restarting vLLM, with the memory tier off", options, environment) as url:
            from_disk = hold_aloud("The same questions after the restart", partial(ask, url), texts)
    return Result(cold, first_held, from_memory, from_disk)


def run_rag(options: Options) -> RagResult:
    environment = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1", **BLENDING}
    console.print()
    with running_server("Starting vLLM with CacheBlend", options, environment) as url:
        console.print("\n[bold]Questions over six documents, chosen and ordered anew each time")
        result = RagResult(list(ask_in_all_ways(partial(ask, url))))
    console.print()
    console.print(result.table())
    return result


def main() -> int:
    options = parse("python -m demo", __doc__, work=".cache/demo")
    try:
        result = run(options)
        rag = run_rag(options)
    except (ServerFailedError, httpx.HTTPError) as error:
        console.print(f"[red bold]The demo could not go on:[/] {escape(str(error))}")
        console.print(f"The server's whole log is {options.log}")
        return 1
    result.write(options.work / "result.json", dtype=options.dtype)

    console.print()
    console.print(result.table())
    console.print(result.summary(options.dtype))
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
