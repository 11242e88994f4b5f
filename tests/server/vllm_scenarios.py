"""What the tests do to a real vLLM that is attached to a server; see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lmcache.blend.rope import FusedRope
from tests.blend_mistakes import unrotated
from tests.vllm import scenarios
from tests.vllm.blend.serving_scenarios import CONFIG, FARTHEST, OPTIONS, PLAIN, Library
from tests.vllm.scenarios import generate, one_by_one, prose_prompts, shared_engines, shut_down, start_llm
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
        answers = tensor_parallel.ask(llm, prompts)
        if config is not None:
            tensor_parallel.on_ranks(llm, tensor_parallel.saved)
        return {"answers": answers}


def read_passages(connector: str) -> dict[str, Any]:
    """Two documents, one behind the other, are read by an engine that then ends."""
    llm = start_llm(connector, CONFIG, **OPTIONS)
    library = Library(llm, documents=2)
    generate(llm, [[*library.system, *library.documents[0], *library.documents[1]]], 1, {"lmcache.blend": False})
    (shared,) = shared_engines()
    shared.saves.wait()
    lengths = [len(document) for document in library.documents]
    shut_down(llm)
    return {"lengths": lengths}


def ask_in_another_order(connector: str) -> dict[str, Any]:
    """The same documents the other way round, by an engine that has computed nothing before."""
    llm = start_llm(connector, CONFIG, **OPTIONS)
    library = Library(llm, documents=2)
    (shared,) = shared_engines()
    assert shared.manager.passages.loaded.wait(30)
    prompt = [
        *library.system,
        *library.documents[1],
        *library.documents[0],
        *llm.get_tokenizer().encode("To repeat it: Shelf 4 of room 1 holds"),
    ]
    all_rows = {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True}
    answers = {
        name: generate(llm, [prompt], 32, params)[0]
        for name, params in (("full", PLAIN), ("all rows", all_rows), ("no rows", FARTHEST))
    }
    with patch.object(FusedRope, "fused_encode", unrotated):
        answers["not turned"] = generate(llm, [prompt], 32, FARTHEST)[0]
    shut_down(llm)
    return answers


if __name__ == "__main__":
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))
