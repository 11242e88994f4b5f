"""What was promised does not come: see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata
from lmcache.integration.vllm.lost_loads import LostLoads
from lmcache.integration.vllm.worker_side import WorkerSide
from tests.vllm.blend.serving_scenarios import CONFIG, OPTIONS, PLAIN, Library
from tests.vllm.scenarios import forget, generate, leaked_references, shared_engines, shut_down, start_llm

KEPT = {"lmcache.blend": False}
BLENDED = {"lmcache.blend_ratio": 0.15, "lmcache.skip_save": True}
TOKENS = 24


def lost(blending: bool, outcomes: list[str]) -> dict[str, Any]:
    """A prefix, and with ``blending`` passages behind one, cannot be loaded in the step that was to load them.

    By vLLM's own wrapper, which loads in the step. (Ours loads before the request's first, and what fails then vLLM
    computes rightly.) Outcomes besides "healed": "hurt", as it is; "nothing done" about it by anybody; "left to vLLM",
    which is told of it after its forward. ``left``: how many blocks vLLM was told of, by outcome. ``begun_early``:
    of each step that loads or blends, whether it was begun before vLLM had prepared its forward.
    """
    start, early = WorkerSide._start, list[bool]()

    def started(side: WorkerSide, meta: LMCacheConnectorMetadata, context: Any) -> None:
        if meta.loads or meta.blends:
            early.append(meta is side._early._begun)
        start(side, meta, context)

    patch.object(WorkerSide, "_start", started).start()
    llm = start_llm(
        "built-in",
        {**CONFIG, "enable_blending": blending},
        **OPTIONS,
        max_num_batched_tokens=512,  # the pages are filled in pieces
        enable_prefix_caching=True,
    )
    library = Library(llm)
    library.warm(llm)
    known = [*library.system, *library.documents[3]]
    begun = llm.get_tokenizer().encode(" Shelf")  # of the answer, which ends at once otherwise
    prompts = {"prefix": [*library.prompt(), *begun]}
    generate(llm, [prompts["prefix"]], 1, KEPT)
    if blending:
        prompts["passages"] = [*library.prompt(), *begun]
        generate(llm, [known], 1, KEPT)
        prompts["passages behind a prefix"] = [
            *known,
            *library.documents[1],
            *library.documents[2],
            *known[-12:],
            *begun,
        ]
    (shared,) = shared_engines()
    shared.saves.wait()
    answers: dict[str, Any] = {}
    left = dict.fromkeys(outcomes, 0)
    take = LostLoads.take_blocks
    for name, prompt in prompts.items():
        params = KEPT if name == "prefix" else BLENDED
        forget(llm)
        answers[name] = {"expected": generate(llm, [prompt], TOKENS, PLAIN)[0]}
        for outcome in outcomes:
            forget(llm)

            def taken(lost_loads: LostLoads, outcome: str = outcome) -> set[int]:
                blocks = take(lost_loads)
                left[outcome] += len(blocks)
                return blocks

            with ExitStack() as patches:
                patches.enter_context(patch.object(LMCacheEngine, "retrieve", side_effect=OSError("injected")))
                patches.enter_context(patch.object(Blender, "_blend", side_effect=OSError("injected")))
                patches.enter_context(patch.object(LostLoads, "take_blocks", taken))
                if outcome == "nothing done":
                    patches.enter_context(patch.object(LostLoads, "_compute", _leave_noise))
                if outcome == "left to vLLM":
                    patches.enter_context(patch.object(LostLoads, "_compute", side_effect=OSError("injected")))
                answers[name][outcome] = generate(llm, [prompt], TOKENS, {**params, "lmcache.skip_save": True})[0]
        forget(llm)
        answers[name]["healed"] = generate(llm, [prompt], TOKENS, {**params, "lmcache.skip_save": True})[0]
    leaks = leaked_references()
    counted = {name: value for name, value in shared.metrics.snapshot().items() if "failure" in name}
    shut_down(llm)
    return {"answers": answers, "left": left, "leaks": leaks, "counted": counted, "begun_early": early}


def picture() -> dict[str, Any]:
    """A load of a prompt with a picture fails, as far as the worker role is told."""
    from lmcache.integration.vllm.connector_metadata import LoadOp

    llm = start_llm("built-in", {"chunk_size": 64}, **OPTIONS)
    prompt = Library(llm).prompt()
    generate(llm, [prompt], 1)
    (shared,) = shared_engines()
    shared.saves.wait()
    left, computed = [], []
    take, make = LostLoads.take_blocks, LoadOp.__init__

    def taken(lost_loads: LostLoads) -> set[int]:
        left.extend(blocks := take(lost_loads))
        return blocks

    def with_picture(op: LoadOp, *args: Any, **fields: Any) -> None:
        make(op, *args, **{**fields, "tokens_say_all": False})

    with (
        patch.object(LMCacheEngine, "retrieve", side_effect=OSError("injected")),
        patch.object(LostLoads, "take_blocks", taken),
        patch.object(LoadOp, "__init__", with_picture),
        patch.object(Blender, "compute", lambda *_: computed.append(1)),
    ):
        generate(llm, [prompt], 1)
    shut_down(llm)
    return {"left": len(left), "computed": len(computed)}


def _leave_noise(lost_loads: LostLoads, _: object) -> None:
    """Pages may still hold what is wanted, of an earlier request."""
    assert lost_loads._pages is not None
    for pages in lost_loads._pages[0].tensors:
        pages.normal_()


def main() -> None:
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
