"""What the tests do to a vLLM whose ranks are processes. Each function runs in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.vllm.scenarios import CONNECTORS
from tests.vllm.tensor_parallel.small_model import prompt

BLOCK = 32


@contextmanager
def serving(
    model: str,
    tp: int,
    config: dict[str, Any] | None = None,
    connector: str = "built-in",
    start_method: str = "fork",
    **options: Any,
) -> Iterator[Any]:
    """A real vLLM on ``tp`` ranks; without ``config`` it has no connector.

    ``start_method``: of the ranks. vLLM would take "spawn", and each import vLLM again, 12 seconds of a core.
    """
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if config is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            **CONNECTORS[connector],
            kv_connector_extra_config={f"lmcache.{key}": value for key, value in config.items()},
        )
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 256,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": tp,
    }
    context = multiprocessing.get_context(start_method)
    with patch.object(multiprocessing, "get_context", lambda method=None: context):
        llm = LLM(model=model, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm: Any, prompts: list[list[int]], max_tokens: int = 6) -> list[dict[str, Any]]:
    """Greedy tokens, one prompt after the other, and what the client is told of the reuse."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
    answers = []
    for ids in prompts:
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        told = (output.kv_transfer_params or {}).get("lmcache", {})
        answers.append({"tokens": list(output.outputs[0].token_ids), "reuse": told})
    return answers


def on_ranks(llm: Any, call: Any, *args: Any) -> list[Any]:
    """What ``call(worker, *args)`` gives in every rank."""
    return list(llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc(call, args=args))


# Called in the ranks' own processes


def _shared() -> Any:
    from lmcache.integration.vllm.shared_engine import SharedEngine

    (shared,) = SharedEngine._live.values()
    shared.saves.wait()
    return shared


def saved(worker: Any) -> None:
    """Once everything is: vLLM gives a rank that it ends a few seconds only, and a busy machine needs more."""
    _shared()


def corrupt(worker: Any, rank: int) -> int:
    """Noise in every chunk that this rank holds in memory, if it is ``rank``."""
    if worker.rank != rank:
        return 0
    memory = _shared().manager.storage.memory
    for key in memory.keys():  # noqa: SIM118
        with memory.get(key) as obj:
            noise = torch.randn(obj.tensor.shape, generator=torch.Generator().manual_seed(0))
            obj.tensor.copy_(noise.to(obj.tensor.dtype))
    return len(memory.keys())


def forget(worker: Any, rank: int, keep: int) -> int:
    """All but the first ``keep`` chunks are gone from the memory of ``rank``."""
    if worker.rank != rank:
        return 0
    memory = _shared().manager.storage.memory
    gone = list(memory.keys())[keep:]
    return sum(memory.remove(key) for key in gone)


def break_loads(worker: Any, rank: int) -> None:
    """From now on no load of this rank succeeds, if it is ``rank``."""
    if worker.rank == rank:
        engine = _shared().engine

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken on purpose")

        engine.retrieve = fail


def held(worker: Any) -> dict[str, Any]:
    """What this rank keeps, and whether anybody still holds on to it."""
    shared = _shared()
    memory = shared.manager.storage.memory
    leaks = []
    for key in memory.keys():  # noqa: SIM118
        with memory.get(key) as obj:
            if obj.ref_count != 2:
                leaks.append(repr(obj))
    digests = sorted(key.digest.hex() for key in memory.keys())  # noqa: SIM118
    return {
        "digests": digests,
        "keys": sorted(key.hex() for key in memory.keys()),  # noqa: SIM118
        "leaks": leaks + [repr(lease) for lease in shared.handed_over.values()],
        "failed_loads": len(shared.failed_loads),
        "bytes": memory.stats().used_bytes,
    }


def free_blocks(llm: Any) -> bool:
    """Whether every page is free again."""
    for _ in range(20):
        llm.llm_engine.step()
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)


def watch_blends(worker: Any, agreeing: bool) -> None:
    """Remember what this rank chooses to recompute; without ``agreeing`` it goes by its own heads alone."""
    from unittest.mock import patch

    from lmcache.integration.vllm.blend.blender import Blender
    from lmcache.integration.vllm.blend.host import VLLMHost

    run, seen = Blender.run, []
    worker.chosen = seen

    def watched(self: Any, requests: Any) -> Any:
        done = run(self, requests)
        seen.extend([list(ranges) for ranges in report.plan.selected] for report in done.values())
        return done

    patch.object(Blender, "run", watched).start()
    if not agreeing:
        patch.object(VLLMHost, "agreed_scores", lambda self, scores, heads: scores).start()


def chosen(worker: Any) -> list[Any]:
    return list(worker.chosen)


# Scenarios


def plain(model: str, tp: int, lengths: list[int], prompts: list[list[int]] | None = None) -> dict[str, Any]:
    """``prompts``: each as lengths and seeds of its parts."""
    made = [[length, length] for length in lengths] + (prompts or [])
    wanted = [[token for at in range(0, len(parts), 2) for token in prompt(parts[at], parts[at + 1])] for parts in made]
    with serving(model, tp) as llm:
        return {"answers": ask(llm, wanted)}


def asked(model: str, tp: int, lengths: list[int], config: dict[str, Any], **options: Any) -> dict[str, Any]:
    with serving(model, tp, config, **options) as llm:
        answers = ask(llm, [prompt(length, length) for length in lengths])
        return {"answers": answers, "ranks": on_ranks(llm, held)}


def reuse(
    model: str, tp: int, lengths: list[int], config: dict[str, Any], connector: str = "built-in", **options: Any
) -> dict[str, Any]:
    """Ask twice, let one rank lose some, break one rank's loads, spoil one rank's KV."""
    prompts = [prompt(length, length) for length in lengths]
    start = time.monotonic()
    with serving(model, tp, config, connector, **options) as llm:
        started = time.monotonic() - start
        first = ask(llm, prompts)
        again = ask(llm, prompts)
        ranks = on_ranks(llm, held)
        on_ranks(llm, corrupt, tp - 1)
        corrupted = ask(llm, prompts)
        free = free_blocks(llm)
        return {
            "first": first,
            "again": again,
            "corrupted": corrupted,
            "ranks": ranks,
            "after": on_ranks(llm, held),
            "free": free,
            "seconds": [started, time.monotonic() - start],
        }


def faults(model: str, tp: int, config: dict[str, Any], connector: str = "built-in") -> dict[str, Any]:
    """One rank has lost a part of what the others have; then its loads fail."""
    short, long = prompt(300, 1), prompt(1000, 2)
    with serving(model, tp, config, connector) as llm:
        expected = ask(llm, [long])
        on_ranks(llm, forget, tp - 1, 5)
        shortened = ask(llm, [long])
        ask(llm, [short])
        on_ranks(llm, break_loads, tp - 1)
        # Longer than what is loaded, so that the step which fails also computes and plans to save chunks.
        longer = short + prompt(500, 3)
        failed = ask(llm, [longer, longer])
        ranks = on_ranks(llm, held)
        return {
            "expected": expected,
            "shortened": shortened,
            "failed": failed,
            "ranks": ranks,
            "free": free_blocks(llm),
        }


PASSAGE = 192


def library_prompt(order: list[int], question: int) -> list[int]:
    """A system prompt, passages in any order, and a question."""
    passages = [token for seed in order for token in prompt(PASSAGE, 100 + seed)]
    return [*prompt(40, 99), *passages, *prompt(24, 1000 + question)]


def blended(
    model: str, tp: int, config: dict[str, Any], connector: str = "built-in", agreeing: bool = True, **options: Any
) -> dict[str, Any]:
    """Passages seen one by one, then together; also with one rank's KV of them spoilt, and after it was lost."""
    from vllm import SamplingParams

    def answers(llm: Any, prompts: list[list[int]], params: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=6,
            detokenize=False,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"lmcache.skip_save": True, **params}},
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "reuse": (output.kv_transfer_params or {}).get("lmcache", {}),
            }
            for output in outputs
        ]

    prompts = [library_prompt(order, at) for at, order in enumerate([[2, 0, 1], [1, 3, 0], [3, 2, 1]])]
    with serving(model, tp, config, connector, **options) as llm:
        on_ranks(llm, watch_blends, agreeing)
        ask(llm, [[*prompt(40, 99), *prompt(PASSAGE, 100 + seed)] for seed in range(4)], 1)
        on_ranks(llm, held)
        found = {
            "plain": answers(llm, prompts, {"lmcache.blend": False, "lmcache.skip_load": True}),
            "all": answers(llm, prompts, {"lmcache.blend_ratio": 1.0}),
            "some": [answers(llm, [ids], {"lmcache.blend_ratio": 0.15})[0] for ids in prompts],
            "none": answers(llm, prompts, {"lmcache.blend_policy": "none", "lmcache.blend_corrector": "none"}),
            "chosen": on_ranks(llm, chosen),
            "ranks": on_ranks(llm, held),
        }
        on_ranks(llm, corrupt, tp - 1)
        found["corrupted"] = answers(llm, prompts, {"lmcache.blend_ratio": 0.0})
        on_ranks(llm, forget, tp - 1, 0)
        found["lost"] = answers(llm, prompts, {})
        found["after"] = on_ranks(llm, held)
        found["free"] = free_blocks(llm)
        return found


if __name__ == "__main__":
    scenario, arguments, path = sys.argv[1:]
    Path(path).write_text(json.dumps(globals()[scenario](**json.loads(arguments))))
