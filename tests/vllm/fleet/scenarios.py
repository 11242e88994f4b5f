"""Servers that share a store. Each function runs in its own process, as one of them; see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.vllm.blend.serving_scenarios import OPTIONS, PLAIN, Library
from tests.vllm.scenarios import generate, leaked_references, shared_engines, shut_down, start_llm

CONFIG = {"enable_blending": True, "chunk_size": 64, "blend_min_tokens": 64, "remote_lookup_seconds": 5.0}
ALL_ROWS = {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True}
FEW_ROWS = {"lmcache.blend_ratio": 0.05, "lmcache.skip_save": True}


def learn(url: str) -> dict[str, Any]:
    """See every document once, and ask one question."""
    llm = start_llm("built-in", {**CONFIG, "remote_url": url}, **OPTIONS)
    library = Library(llm)
    library.warm(llm)
    prompt = question(llm, library)
    answer = generate(llm, [prompt], 16, {"lmcache.blend": False})[0]
    settle()
    shut_down(llm)
    return {"answer": answer}


def ask(url: str) -> dict[str, Any]:
    """The same question, and one over the same documents in another order, by a server that has seen nothing."""
    llm = start_llm("built-in", {**CONFIG, "remote_url": url}, **OPTIONS)
    library = Library(llm)
    prompt, other = question(llm, library), question(llm, library)
    expected = [generate(llm, [each], 16, PLAIN)[0] for each in (prompt, other)]
    same = generate(llm, [prompt], 16, {"lmcache.blend": False, "lmcache.skip_save": True})[0]
    blended = generate(llm, [other], 16, ALL_ROWS)[0]
    few = generate(llm, [other], 16, FEW_ROWS)[0]
    leaks = leaked_references()
    shut_down(llm)
    return {"expected": expected, "same": same, "blended": blended, "few": few, "leaks": leaks}


def question(llm: Any, library: Library) -> list[int]:
    """One that the model answers at length."""
    return library.prompt() + llm.get_tokenizer().encode(" In this room there are")


def settle() -> None:
    """Until all that was stored and published has reached the store."""
    (shared,) = shared_engines()
    shared.saves.wait()
    assert shared.manager.storage.flush(60)
    (tier,) = (tier for tier in shared.manager.storage._slower if tier.name == "remote")
    while any(tier._waiting.values()):
        time.sleep(0.01)


def main() -> None:
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
