"""usage: python -m demo --model FOLDER. Exits with 1 if a text differs or nothing was reused."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from demo.conversation import SERVED_NAME, WITHOUT_CACHE, Answer, Conversation
from demo.rag import ENVIRONMENT as BLENDING
from demo.rag import RagResult, ask_in_all_ways
from demo.report import Result
from demo.server import ServerFailedError, VLLMServer

CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def running_server(title: str, model: Path, dtype: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A ready and warmed-up server; gives its address."""
    arguments = [
        *("--model", str(model), "--served-model-name", SERVED_NAME),
        *("--dtype", dtype, "--max-model-len", "4096", "--enforce-eager"),
        "--no-enable-prefix-caching",  # so that all reuse that is shown is ours
        "--enable-per-request-metrics",
        *("--kv-transfer-config", json.dumps(CONNECTOR)),
    ]
    with VLLMServer(arguments, environment, log) as server:
        start = time.monotonic()
        if not console.is_terminal:
            console.print(f"{title} …")
        with console.status(f"{title} …") as status:

            def show(line: str) -> None:
                status.update(f"{title}: {time.monotonic() - start:.0f} s  [dim]{escape(line[-90:])}")

            seconds = server.wait_until_ready(show)
            Conversation(server.url).warm_up()
        console.print(f"[bold]{title}:[/bold] ready after {seconds:.0f} s")
        yield server.url


def ask_all(title: str, conversation: Conversation, params: dict[str, Any] | None = None) -> list[Answer]:
    console.print(f"\n[bold]{title}")
    answers = []
    for answer in conversation.hold(params):
        origin = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in answer.tokens_by_tier.items())
        figures = f"{answer.seconds_to_first_token:.2f} s, {answer.prompt_tokens:,} tokens"
        console.print(f"  [cyan]{answer.question}[/cyan]  [dim]{figures}{', ' + origin if origin else ''}")
        console.print(f"    {escape(answer.text.strip())}")
        answers.append(answer)
    return answers


def run(model: Path, dtype: str, work: Path, log: Path) -> Result:
    with tempfile.TemporaryDirectory(dir=work, prefix="disk-") as disk:
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
            "LMCACHE_LOCAL_DISK": disk,
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "2",
        }
        with running_server("Starting vLLM", model, dtype, log, environment) as url:
            cold = ask_all("Without the cache: vLLM computes every prompt", Conversation(url), WITHOUT_CACHE)
            texts = [answer.text for answer in cold]
            first_held = ask_all("The same conversation with the cache", Conversation(url, texts))
            from_memory = ask_all("The same questions again", Conversation(url, texts))
        console.print()
        # What is read from disk is kept in memory as well, so the second question would find most of its prompt there.
        # Without the memory tier every question shows the disk.
        environment["LMCACHE_LOCAL_CPU"] = "false"
        with running_server("Restarting vLLM, with the memory tier off", model, dtype, log, environment) as url:
            from_disk = ask_all("The same questions after the restart", Conversation(url, texts))
    return Result(cold, first_held, from_memory, from_disk)


def run_rag(model: Path, dtype: str, log: Path) -> RagResult:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1", **BLENDING}
    console.print()
    with running_server("Starting vLLM with CacheBlend", model, dtype, log, environment) as url:
        console.print("\n[bold]Questions over six documents, chosen and ordered anew each time")
        result = RagResult(list(ask_in_all_ways(url)))
    console.print()
    console.print(result.table())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, see scripts/prepare_model.py")
    # In 16 bits the text can depend on how vLLM cuts a prompt into steps, with its own prefix cache as with ours.
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--work", type=Path, default=Path(".cache/demo"), help="folder for the log and the result")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended on the way out
    options.work.mkdir(parents=True, exist_ok=True)
    log = options.work / "server.log"
    log.write_text("")
    try:
        result = run(options.model.resolve(), options.dtype, options.work.resolve(), log)
        rag = run_rag(options.model.resolve(), options.dtype, log)
    except (ServerFailedError, httpx.HTTPError) as error:
        console.print(f"[red bold]The demo could not go on:[/] {escape(str(error))}")
        console.print(f"The server's whole log is {log}")
        return 1
    result.write(options.work / "result.json", dtype=options.dtype)

    console.print()
    console.print(result.table())
    memory, disk = result.median_ratios()
    console.print(
        f"The first token came {memory:.1f} times sooner with KV from host memory, and {disk:.1f} times sooner with KV "
        f"from disk after a restart (medians).\n[dim]Greedy text in {options.dtype}. The model is small (135 million "
        f"parameters): its answers are often wrong, and must be equally wrong in every row.\n"
        f"Log and figures: {options.work}"
    )
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
