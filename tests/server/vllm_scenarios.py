"""What the tests do to a real vLLM that is attached to a server; see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.vllm import scenarios
from tests.vllm.scenarios import one_by_one, prose_prompts, shut_down, start_llm
from tests.vllm.tensor_parallel import scenarios as tensor_parallel

scenarios.CONNECTORS["mp"] = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}


def ask(lengths: list[int], connector: str | None, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """One answer to each prompt, and which connector gave it."""
    llm = start_llm(connector, config, **options)
    answers = one_by_one(llm, prose_prompts(llm, lengths))
    shut_down(llm)
    return {"answers": answers}


def ask_ranks(model: str, prompts: list[list[int]], config: dict[str, Any] | None) -> dict[str, Any]:
    """On two ranks."""
    with tensor_parallel.serving(model, 2, config, "mp") as llm:
        return {"answers": tensor_parallel.ask(llm, prompts)}


if __name__ == "__main__":
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))
