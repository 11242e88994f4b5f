"""What vLLM does with the folder that it shares with SGLang; in a process of vLLM's own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.vllm.scenarios import one_by_one, prose_prompts, shut_down, start_llm

LENGTHS = [100, 137, 160, 200]
"""Of the prompts that are answered here first; as many others are SGLang's to begin with."""


def main() -> None:
    """``vllm_side.py FOLDER RESULT WHICH``: answer the prompts ``WHICH``, "first" or "second"."""
    folder, result, which = sys.argv[1:]
    config = {
        "chunk_size": 16,
        "chunk_layout": "token_major",
        "local_cpu": False,
        "max_local_cpu_size": 0.5,
        "local_disk": folder,
    }
    llm = start_llm("built-in", config)
    prompts = prose_prompts(llm, LENGTHS * 2)
    mine = prompts[: len(LENGTHS)] if which == "first" else prompts[len(LENGTHS) :]
    answers = one_by_one(llm, mine, 8)
    shut_down(llm)
    told = {"prompts": prompts, "tokens": [a["tokens"] for a in answers], "reuse": [a["reuse"] for a in answers]}
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
