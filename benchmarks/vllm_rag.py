"""Seconds to first token of a RAG prompt on a real vLLM, against vLLM's own prefill in the same run.

python benchmarks/vllm_rag.py --model DIR [--dtype float32] [--turns 5] [--tokens 3000]

System prompt, passages, question; every passage was seen before, alone behind the system prompt, and they come in a new
order each turn. Ways take turns; figures are medians. "nothing to reuse" is a prompt that nobody has seen, once with
CacheBlend on, once on a vLLM without a connector in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
PASSAGES = 6
WAYS = {
    "vLLM": {"lmcache.skip_load": True, "lmcache.skip_save": True, "lmcache.blend": False},
    "CacheBlend 15 %": {"lmcache.blend_ratio": 0.15, "lmcache.skip_save": True},
    "CacheBlend 5 %": {"lmcache.blend_ratio": 0.05, "lmcache.skip_save": True},
}


def start(options: argparse.Namespace, *, connector: bool) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = None
    if connector:
        transfer = KVTransferConfig(
            kv_connector="LMCacheConnectorV1",
            kv_role="kv_both",
            kv_connector_extra_config={"lmcache.enable_blending": True, "lmcache.max_local_cpu_size": 2},
        )
    return LLM(
        model=str(options.model),
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=4096,
        enable_prefix_caching=False,
        kv_transfer_config=transfer,
    )


def ask(llm: Any, tokens: list[int], params: dict[str, Any] | None) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token, and what the reply says."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=1, extra_args={"kv_transfer_params": params} if params else None
    )
    begin = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    return time.perf_counter() - begin, (output.kv_transfer_params or {}).get("lmcache", {})


def text(llm: Any, count: int, seed: int) -> list[int]:
    """``count`` tokens of readable text, another for each seed."""
    draw = random.Random(seed)
    kinds = ("ships", "birds", "stars", "bridges", "tea", "maps", "clocks")
    sentences = (
        f"Shelf {draw.randrange(1000)} of room {draw.randrange(1000)} holds {draw.randrange(1000)} books about "
        f"{draw.choice(kinds)} and {draw.choice(kinds)}."
        for _ in range(count // 12 + 8)
    )
    tokens: list[int] = llm.get_tokenizer().encode(" ".join(sentences))
    return tokens[:count]


def with_connector(options: argparse.Namespace) -> dict[str, Any]:
    llm = start(options, connector=True)
    system, question = text(llm, 60, -1), text(llm, 20, -2)
    length = (options.tokens - len(system) - len(question)) // PASSAGES
    passages = [text(llm, length, seed) for seed in range(PASSAGES)]
    for passage in passages:
        ask(llm, system + passage, {"lmcache.blend": False})
    seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, "nothing to reuse")}
    replies: dict[str, Any] = {}
    for turn in range(options.turns + 1):
        order = random.Random(turn).sample(passages, PASSAGES)
        prompt = [*system, *(token for passage in order for token in passage), *question]
        for way, params in WAYS.items():
            spent, replies[way] = ask(llm, prompt, params)
            seconds[way].append(spent)
        seconds["nothing to reuse"].append(ask(llm, text(llm, len(prompt), 1000 + turn), None)[0])
    return {"seconds": {way: spent[1:] for way, spent in seconds.items()}, "replies": replies}  # the first warms up


def without_connector(options: argparse.Namespace) -> dict[str, Any]:
    llm = start(options, connector=False)
    spent = [ask(llm, text(llm, options.tokens, 1000 + turn), None)[0] for turn in range(options.turns + 1)]
    return {"seconds": spent[1:]}


def in_a_process(part: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        *(sys.executable, __file__, "--part", part, "--model", str(options.model), "--dtype", options.dtype),
        *("--turns", str(options.turns), "--tokens", str(options.tokens)),
    ]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--part", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps((with_connector if options.part == "with" else without_connector)(options)))
        return
    ours, plain = in_a_process("with", options), in_a_process("without", options)
    reference = median(ours["seconds"]["vLLM"])
    print(f"{options.tokens} tokens, {options.dtype}, medians of {options.turns} turns")
    for way, spent in ours["seconds"].items():
        against = median(plain["seconds"]) if way == "nothing to reuse" else reference
        print(f"{way:18} {median(spent):6.3f} s  {median(spent) / against:.3f} of vLLM's own prefill")
    for way, reply in ours["replies"].items():
        if blend := reply.get("blend"):
            print(
                f"{way}: {blend['recomputed_tokens']} of {reply['reused_tokens']} recomputed; {blend['milliseconds']}"
            )


if __name__ == "__main__":
    main()
