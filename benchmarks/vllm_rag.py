"""Seconds to first token of a RAG prompt on a real vLLM, against vLLM's own prefill in the same turn.

python benchmarks/vllm_rag.py --model DIR [--dtype float32] [--runs 5] [--tokens 3000] [--json FILE]

System prompt, passages, question; every passage was seen before, alone behind the system prompt, and they come in a new
order each turn. The passage that comes first is therefore an exact prefix. "new text" is a prompt that nobody has seen,
once with CacheBlend on, once on a vLLM without a connector. The two vLLMs are processes of their own, one at work at a
time. Ways take turns; a ratio is taken in each turn by itself, and its median is told with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoTokenizer

from lmcache.bench.machine import describe_machine
from lmcache.bench.timing import Work, share, take_turns
from lmcache.evaluation.tasks.generate import generate_task
from lmcache.evaluation.tasks.world import Size

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
SYSTEM_TOKENS, QUESTION_TOKENS = 60, 20

PREFILL = "vLLM's prefill"
NEW_TEXT, NEW_TEXT_PLAIN = "new text, CacheBlend on", "new text, no connector"
BUDGETS = {"CacheBlend 15 %": 0.15, "CacheBlend 5 %": 0.05}
# What a way is compared with, and the most that it may take of that.
TARGETS = {"CacheBlend 15 %": (PREFILL, 0.27), "CacheBlend 5 %": (PREFILL, 0.17), NEW_TEXT: (NEW_TEXT_PLAIN, 1.02)}

Report = dict[str, Any]


def serve(options: argparse.Namespace) -> None:
    """Answer prompts, a JSON line each, until standard input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints must not stand among the replies
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="LMCacheConnectorV1",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache.enable_blending": True, "lmcache.max_local_cpu_size": 4},
    )
    llm = LLM(
        model=str(options.model),
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=4096,
        enable_prefix_caching=False,
        kv_transfer_config=transfer if options.serve == "connector" else None,
    )
    for line in sys.stdin:
        request = json.loads(line)
        arguments = {"kv_transfer_params": request["params"]} if request["params"] else None
        sampling = SamplingParams(temperature=0, max_tokens=1, extra_args=arguments)
        (output,) = llm.generate([{"prompt_token_ids": request["tokens"]}], sampling, use_tqdm=False)
        print(json.dumps((output.kv_transfer_params or {}).get("lmcache", {})), file=replies, flush=True)


class OfflineVLLM:
    """vLLM in a process of its own, with or without our connector; it works only while it is asked."""

    def __init__(self, options: argparse.Namespace, kind: str) -> None:
        command = [sys.executable, __file__, "--serve", kind, "--model", str(options.model), "--dtype", options.dtype]
        self._process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> OfflineVLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def first_token(self, tokens: Sequence[int], params: dict[str, Any] | None = None) -> Report:
        """Returns when the first token is there, with what the reply says about reuse."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"tokens": list(tokens), "params": params}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("vLLM has ended; what it said last is above")
        report: Report = json.loads(line)
        return report


def passages(encode: Callable[[str], list[int]], length: int, seed: int) -> list[list[int]]:
    """``PASSAGES`` of ``length`` tokens, others for each ``seed``."""
    written = generate_task("single_fact", seed, Size(2 * PASSAGES, 300)).passages
    encoded = [encode(" ".join(written[start : start + 2]))[:length] for start in range(0, 2 * PASSAGES, 2)]
    if min(map(len, encoded)) < length:
        raise SystemExit(f"no passages of {length} tokens can be written: lower --tokens")
    return encoded


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return encoded

    length = (options.tokens - SYSTEM_TOKENS - QUESTION_TOKENS) // PASSAGES
    system = passages(encode, SYSTEM_TOKENS, 1)[0]
    question = passages(encode, QUESTION_TOKENS, 2)[0]
    known = passages(encode, length, 0)

    def prompt(parts: list[list[int]]) -> list[int]:
        return [*system, *(token for part in parts for token in part), *question]

    def reordered() -> Iterator[list[int]]:
        for turn in range(options.runs + 1):
            yield prompt(random.Random(turn).sample(known, PASSAGES))

    def unseen() -> Iterator[list[int]]:
        for turn in range(options.runs + 1):
            opening = passages(encode, SYSTEM_TOKENS, 2000 + turn)[0]
            fresh = passages(encode, length, 1000 + turn)
            yield [*opening, *(token for part in fresh for token in part), *question]

    machine = describe_machine()
    reports: dict[str, list[Report]] = {}
    with OfflineVLLM(options, "connector") as ours, OfflineVLLM(options, "plain") as plain:
        for passage in known:
            ours.first_token([*system, *passage], {"lmcache.blend": False})

        def way(
            name: str, vllm: OfflineVLLM, prompts: Iterator[list[int]], params: dict[str, Any] | None = None
        ) -> Work:
            waiting: list[list[int]] = []

            def ask() -> None:
                reports.setdefault(name, []).append(vllm.first_token(waiting.pop(), params))

            return Work(ask, before=lambda: waiting.append(next(prompts)))

        works = {
            PREFILL: way(PREFILL, ours, reordered(), {"lmcache.skip_load": True, "lmcache.skip_save": True}),
            **{
                name: way(name, ours, reordered(), {"lmcache.blend_ratio": budget, "lmcache.skip_save": True})
                for name, budget in BUDGETS.items()
            },
            NEW_TEXT: way(NEW_TEXT, ours, unseen()),
            NEW_TEXT_PLAIN: way(NEW_TEXT_PLAIN, plain, unseen()),
        }
        taken = take_turns(works, options.runs)
    check(reports, len(prompt(known)))
    rows = [row(name, taken, reports[name][1:]) for name in works]
    return {
        "machine": machine,
        "model": str(options.model),
        "dtype": options.dtype,
        "tokens": len(prompt(known)),
        "runs": options.runs,
        "rows": rows,
    }


def check(reports: dict[str, list[Report]], tokens: int) -> None:
    """A figure must be of what its name says."""
    for name, said in reports.items():
        for report in said:
            reused, blend = report.get("reused_tokens", 0), report.get("blend") or {}
            if name in BUDGETS:
                right = blend.get("fallback", "nothing") is None and reused > 0.9 * tokens
            else:
                right = reused == 0
            if not right:
                raise SystemExit(f"{name}: {reused} of {tokens} tokens reused, {json.dumps(report)}")


def row(name: str, taken: dict[str, list[float]], said: list[Report]) -> dict[str, Any]:
    figures: dict[str, Any] = {"way": name, "seconds": statistics.median(taken[name]), "each": taken[name]}
    if name in TARGETS:
        other, at_most = TARGETS[name]
        ratio = share(taken[other], taken[name])  # ours over the other's
        figures |= {"of": other, "ratio": ratio.median, "quartiles": [ratio.low, ratio.high], "at_most": at_most}
    if name in BUDGETS:
        blends = [report["blend"] for report in said]
        figures |= {
            "reused_tokens": statistics.median(report["reused_tokens"] for report in said),
            "prefix_tokens": statistics.median(blend["prefix_tokens"] for blend in blends),
            "recomputed_tokens": statistics.median(blend["recomputed_tokens"] for blend in blends),
            "milliseconds": {
                phase: statistics.median(blend["milliseconds"][phase] for blend in blends)
                for phase in blends[0]["milliseconds"]
            },
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--serve", choices=["connector", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    figures = measure(options)
    print(f"{figures['machine']}\n{figures['tokens']} tokens, {options.dtype}, medians of {options.runs} turns")
    for found in figures["rows"]:
        line = f"{found['way']:24} {found['seconds']:7.3f} s"
        if "ratio" in found:
            low, high = found["quartiles"]
            line += f"  {found['ratio']:.3f} of {found['of']} ({low:.3f}–{high:.3f}; at most {found['at_most']})"
        print(line)
    for found in figures["rows"]:
        if "milliseconds" in found:
            phases = ", ".join(f"{name} {spent:.0f}" for name, spent in found["milliseconds"].items())
            print(
                f"{found['way']}: {found['reused_tokens']:.0f} reused, {found['prefix_tokens']:.0f} of them exact, "
                f"{found['recomputed_tokens']:.0f} recomputed; ms: {phases}"
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
