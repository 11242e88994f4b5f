"""Ways by which blended KV could reach an exact cache; see :mod:`tests.vllm.harness`.

Each scenario gives ``attacks`` (a name, a prompt and what a plain request for it was answered) and how many requests
were ``blended``; :func:`fresh` gives what a vLLM without us answers.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.vllm.blend.block_hashes import SaltedBlockHashes
from lmcache.integration.vllm.lost_loads import LostLoads
from lmcache.integration.vllm.request_tracker import RequestTracker
from tests.vllm.blend.serving_scenarios import CONFIG, FARTHEST, PLAIN, Library
from tests.vllm.scenarios import leaked_references, shared_engines, shut_down, start_llm

KEEPING = {key: value for key, value in FARTHEST.items() if key != "lmcache.skip_save"}
PREFIX_ONLY = {"lmcache.blend": False, "lmcache.skip_save": True}
ALL_ROWS = {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True}
MAX_TOKENS = 8


class Session:
    """Requests to one vLLM, which may be in flight together."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.finished: dict[str, Any] = {}

    def add(self, name: str, prompt: list[int], params: dict[str, Any], max_tokens: int = MAX_TOKENS) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            logprobs=2,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                completion = output.outputs[0]
                self.finished[output.request_id] = {
                    "tokens": list(completion.token_ids),
                    "best_two": [
                        sorted((entry.logprob for entry in at.values()), reverse=True)[:2] for at in completion.logprobs
                    ],
                    "reuse": (output.kv_transfer_params or {}).get("lmcache", {}),
                }

    def run(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()
        for shared in shared_engines():
            shared.saves.wait()

    def ask(self, prompt: list[int], params: dict[str, Any], max_tokens: int = MAX_TOKENS) -> Any:
        self.add("asked", prompt, params, max_tokens)
        self.run()
        return self.finished.pop("asked")

    def forget(self, llm: Any) -> None:
        """Empty vLLM's prefix cache, once the last saves have given their blocks back."""
        while not llm.reset_prefix_cache():
            self.engine.step()

    def preemptions(self, name: str) -> int:
        requests = self.scheduler.requests.values()
        return max((one.num_preemptions for one in requests if one.request_id.startswith(name)), default=0)


def undefended() -> ExitStack:
    """Nothing keeps blended KV out of vLLM's prefix cache, or out of ours."""
    patches = ExitStack()
    patches.enter_context(patch.object(SaltedBlockHashes, "apply", lambda *_: None))
    patches.enter_context(patch.object(RequestTracker, "exact_tokens", PropertyMock(return_value=None)))
    return patches


def was_blended(answer: dict[str, Any]) -> bool:
    return bool((answer["reuse"].get("blend") or {}).get("segments"))


def fresh(prompts: list[list[int]]) -> dict[str, Any]:
    llm = start_llm(None, max_model_len=2048)
    session = Session(llm)
    return {"answers": [session.ask(prompt, {}) for prompt in prompts]}


def preempted(defended: bool) -> dict[str, Any]:
    """A blended request loses its blocks in the middle of its answer; the same is asked plainly then, and later."""
    config = {**CONFIG, "save_decode_cache": True}
    few = {"num_gpu_blocks_override": 34, "block_size": 32, "max_model_len": 1024, "max_num_seqs": 4}
    llm = start_llm("built-in", config, **few, enable_prefix_caching=True)
    library, session = Library(llm), Session(llm)
    library.warm(llm)
    filler, prompt = library.documents[0][:160], library.prompt(4)[:960]
    with ExitStack() if defended else undefended():
        session.add("filler", filler, PLAIN, 200)
        session.step()
        session.add("blended", prompt, KEEPING, 150)
        asked, taken = False, 0
        while session.engine.has_unfinished_requests():
            session.step()
            taken = max(taken, session.preemptions("blended"))
            if taken and not asked:
                asked = True
                session.add("meanwhile", prompt, PLAIN)
        session.run()
        blended = session.finished["blended"]
        longer = prompt + blended["tokens"][:100]
        attacks = [
            ("while it waits", prompt, session.finished["meanwhile"]),
            ("afterwards", prompt, session.ask(prompt, PLAIN)),
            ("from our own cache", prompt, session.ask(prompt, PREFIX_ONLY)),
            ("continued", longer, session.ask(longer, PLAIN)),
            ("continued, from our own cache", longer, session.ask(longer, PREFIX_ONLY)),
        ]
    answer = {
        "attacks": attacks,
        "blended": int(was_blended(blended)),
        "preempted": taken,
        "leaks": leaked_references(),
    }
    shut_down(llm)
    return answer


def filled(directory: str, defended: bool) -> dict[str, Any]:
    """Blended requests on a server with a disk. Pages are large, so that a blend may fit into the last of a prompt."""
    config = {**CONFIG, "save_decode_cache": True, "local_disk": directory, "max_local_disk_size": 1.0}
    llm = start_llm("built-in", config, block_size=128, max_model_len=2048, enable_prefix_caching=True)
    library, session = Library(llm), Session(llm)
    library.warm(llm)
    passage = library.documents[5][:100]
    known = [*library.system, *library.documents[0], *library.documents[1], *library.documents[2]][:512]
    session.ask(known, {"lmcache.blend": False})
    prompts = {
        "in whole pages": library.prompt(4),
        "in the last page": [*known, *passage],
        "in less than a page": [*library.system[:10], *passage],
    }
    attacks, blended = [], 0
    with ExitStack() if defended else undefended():
        for name, prompt in prompts.items():
            answer = session.ask(prompt, KEEPING, 140)
            blended += was_blended(answer)
            longer = prompt + answer["tokens"][:-2]
            attacks.append((name, prompt, session.ask(prompt, PLAIN)))
            attacks.append((f"{name}, continued", longer, session.ask(longer, PLAIN)))
    leaks = leaked_references()
    shut_down(llm)
    return {"attacks": attacks, "blended": blended, "leaks": leaks, "known": known}


def restarted(directory: str, prompts: list[list[int]], known: list[int]) -> dict[str, Any]:
    """Another server on the same disk: its exact cache serves what the first one kept."""
    config = {**CONFIG, "local_disk": directory, "max_local_disk_size": 1.0}
    llm = start_llm("built-in", config, block_size=128, max_model_len=2048, enable_prefix_caching=True)
    session = Session(llm)
    attacks = [("restarted", prompt, session.ask(prompt, PREFIX_ONLY)) for prompt in prompts]
    session.forget(llm)
    exact = session.ask([*known, *known[:64]], PREFIX_ONLY)
    leaks = leaked_references()
    shut_down(llm)
    return {"attacks": attacks, "exact": exact["reuse"]["reused_tokens"], "leaks": leaks}


def prefix_in_flight(layerwise: bool = False, failing: bool = False, computed: bool = True) -> dict[str, Any]:
    """The exact prefix of a blend is vLLM's by name, and is filled in the very step in which the blend begins.

    The request in front of it computes it, or loads it: layer by layer, or ``failing``, and then it is ``computed`` in
    place of the load, or left to vLLM.
    """
    llm = start_llm(
        "built-in",
        {**CONFIG, "use_layerwise": layerwise},
        block_size=32,
        max_model_len=2048,
        max_num_batched_tokens=768,
        enable_prefix_caching=True,
    )
    library, session = Library(llm), Session(llm)
    library.warm(llm)
    new = library.prompt(1)[::-1]  # a text that no document holds
    question = library.prompt(1)[-16:]
    first, second = [*new, *question], [*new, *library.documents[2], *library.documents[1], *question]
    params = PLAIN
    if layerwise or failing:
        session.ask(first, {"lmcache.blend": False})
        session.forget(llm)
        params = PREFIX_ONLY
    session.add("first", first, params)
    session.add("second", second, ALL_ROWS)
    with ExitStack() as patches:
        if failing:
            patches.enter_context(patch.object(LMCacheEngine, "retrieve", side_effect=OSError("injected")))
        if not computed:
            patches.enter_context(patch.object(LostLoads, "_compute", side_effect=OSError("injected")))
        session.run()
    answer = session.finished["second"]
    leaks = leaked_references()
    shut_down(llm)
    return {"attacks": [("behind it", second, answer)], "blended": int(was_blended(answer)), "leaks": leaks}


def main() -> None:
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
