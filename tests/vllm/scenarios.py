"""What the tests do to a real vLLM. Each function runs in its own process; see :mod:`harness`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from lmcache.storage.disk import LocalDiskTier
from tests.vllm.harness import model_path

BUILT_IN = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
DYNAMIC = {
    "kv_connector": "LMCacheConnectorV1Dynamic",
    "kv_connector_module_path": "lmcache.integration.vllm.lmcache_connector_v1",
    "kv_role": "kv_both",
}
CONNECTORS = {"built-in": BUILT_IN, "dynamic": DYNAMIC}


def start_llm(connector: str | None, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """A real vLLM; ``config`` holds our keys, without their prefix."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if connector is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            **CONNECTORS[connector],
            kv_connector_extra_config={f"lmcache.{key}": value for key, value in (config or {}).items()},
        )
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "enable_prefix_caching": False}
    return LLM(model=str(model_path()), **{**defaults, **options})


def generate(llm: Any, prompts: list[Any], max_tokens: int = 16, params: dict[str, Any] | None = None) -> Any:
    """Greedy tokens and what the client is told of the reuse, per prompt (lists of token ids, or dicts)."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=2, extra_args={"kv_transfer_params": params} if params else None
    )
    inputs = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "best_two": [
                sorted(((entry.logprob, token) for token, entry in position.items()), reverse=True)[:2]
                for position in output.outputs[0].logprobs
            ],
            "reuse": (output.kv_transfer_params or {}).get("lmcache", {}),
        }
        for output in outputs
    ]


def one_by_one(llm: Any, prompts: list[Any], max_tokens: int = 16) -> Any:
    """:func:`generate`, each prompt alone in its batch, so that runs differ in nothing but the reuse."""
    return [generate(llm, [prompt], max_tokens)[0] for prompt in prompts]


def prose_prompts(llm: Any, lengths: list[int]) -> list[list[int]]:
    """Prompts of the given numbers of tokens, each another text that ends in a question."""
    tokenizer = llm.get_tokenizer()
    prompts = []
    for index, length in enumerate(lengths):
        facts = " ".join(
            f"Shelf {n} of room {index} holds {(n * 7919 + index * 104729) % 997} books about "
            f"{('ships', 'birds', 'stars', 'bridges', 'tea')[(n + index) % 5]}."
            for n in range(length // 8 + 8)
        )
        question = tokenizer.encode(f"\nQuestion: how many books does shelf {index % 5 + 2} hold? Answer: Shelf")
        prompts.append(tokenizer.encode(facts)[: length - len(question)] + question)
    return prompts


def forget(llm: Any, *, ours_too: bool = False) -> bool:
    """Empty vLLM's prefix cache once the last step and the last saves have given their blocks back; whether it is."""
    for _ in range(1000):
        if llm.reset_prefix_cache(reset_connector=ours_too):
            return True
        llm.llm_engine.step()
    return False


def shut_down(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def shared_engines() -> list[Any]:
    from lmcache.integration.vllm.shared_engine import SharedEngine

    return list(SharedEngine._live.values())


def corrupt_memory() -> int:
    """Add noise to every chunk that lies in host memory; how many there were."""
    (shared,) = shared_engines()
    shared.saves.wait()
    memory = shared.manager.storage.memory
    keys = memory.keys()
    for key in keys:
        with memory.get(key) as obj:
            noise = torch.randn(obj.tensor.shape, generator=torch.Generator().manual_seed(0))
            obj.tensor.copy_(noise.to(obj.tensor.dtype))
    return len(keys)


def leaked_references() -> list[str]:
    """Objects that someone still holds although no request is running."""
    (shared,) = shared_engines()
    shared.saves.wait()
    shared.manager.storage.flush(60)
    memory = shared.manager.storage.memory
    leaks = []
    for key in list(memory.keys()):
        with memory.get(key) as obj:
            if obj.ref_count != 2:  # the tier's and ours
                leaks.append(repr(obj))
    return leaks + [repr(lease) for lease in shared.handed_over.values()]


def free_blocks(engine: Any) -> tuple[int, int]:
    """Pages that are free, and all that there are, once the last saves have given theirs back."""
    for shared in shared_engines():
        shared.saves.wait()
    for _ in range(10):
        engine.step()
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


# Scenarios


def plain(lengths: list[int], dtype: str, max_tokens: int = 16) -> dict[str, Any]:
    llm = start_llm(None, dtype=dtype)
    return {"answers": one_by_one(llm, prose_prompts(llm, lengths), max_tokens)}


def reuse(
    lengths: list[int], dtype: str, config: dict[str, Any], connector: str = "built-in", max_tokens: int = 16
) -> dict[str, Any]:
    """Ask everything, ask again (host memory), corrupt what is held, ask a third time."""
    llm = start_llm(connector, config, dtype=dtype)
    prompts = prose_prompts(llm, lengths)
    first = one_by_one(llm, prompts, max_tokens)
    again = one_by_one(llm, prompts, max_tokens)
    leaks = leaked_references()
    corrupt_memory()
    corrupted = one_by_one(llm, prompts[:6], max_tokens)
    shut_down(llm)
    return {"first": first, "again": again, "corrupted": corrupted, "leaks": leaks}


def from_disk(lengths: list[int], dtype: str, config: dict[str, Any], max_tokens: int = 16) -> dict[str, Any]:
    """Ask on a cache directory that an earlier server filled."""
    llm = start_llm("built-in", config, dtype=dtype)
    prompts = prose_prompts(llm, lengths)
    answers = one_by_one(llm, prompts, max_tokens)
    leaks = leaked_references()
    shut_down(llm)
    return {"answers": answers, "leaks": leaks}


def isolation(config: dict[str, Any], loras: list[str]) -> dict[str, Any]:
    """One prompt under two salts and, where given, two adapters: who reuses whose KV."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = start_llm("built-in", config, enable_lora=bool(loras), max_loras=2, max_lora_rank=8)
    (prompt,) = prose_prompts(llm, [400])
    sampling = SamplingParams(temperature=0, max_tokens=16)

    def ask(salt: str | None = None, adapter: int | None = None) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            request["cache_salt"] = salt
        lora = None if adapter is None else LoRARequest(f"adapter-{adapter}", adapter + 1, loras[adapter])
        (output,) = llm.generate([request], sampling, use_tqdm=False, lora_request=lora)
        return {
            "tokens": list(output.outputs[0].token_ids),
            "reused": output.kv_transfer_params["lmcache"]["reused_tokens"],
        }

    salts = [None, None, "alice", "alice", "bob", "bob", None]
    answers = {"salts": [ask(salt=salt) for salt in salts]}
    adapters = [0, 0, 1, 1, None, 0] if loras else []
    answers["adapters"] = [ask(adapter=adapter) for adapter in adapters]
    shut_down(llm)
    return answers


def request_params(config: dict[str, Any]) -> dict[str, Any]:
    """``skip_save`` and ``skip_load`` per request."""
    llm = start_llm("built-in", config)
    first, second = prose_prompts(llm, [400, 400])
    answers = {
        "unsaved": generate(llm, [first], params={"lmcache.skip_save": True}),
        "after_unsaved": generate(llm, [first]),
        "reused": generate(llm, [first]),
        "not_loaded": generate(llm, [first], params={"lmcache.skip_load": True}),
        "twins": generate(llm, [second, second, second]),
        "after_twins": generate(llm, [second]),
    }
    shut_down(llm)
    return answers


def prefix_caching(config: dict[str, Any], connector: str) -> dict[str, Any]:
    """With vLLM's own prefix cache on and chunked prefill: its hits, ours behind its, and ours alone."""
    llm = start_llm(connector, config, enable_prefix_caching=True, max_num_batched_tokens=256, block_size=32)
    short, long = prose_prompts(llm, [500, 900])
    long = short[:450] + long[450:]
    answers = {"short": generate(llm, [short]), "long": generate(llm, [long]), "repeat": generate(llm, [long])}
    forget(llm)
    answers["short_again"] = generate(llm, [short])
    answers["long_behind_short"] = generate(llm, [long])  # the first 450 tokens come from vLLM, the rest from us
    answers["leaks"] = leaked_references()
    if connector == "dynamic":
        answers["reset"] = forget(llm, ours_too=True)
        answers["after_reset"] = generate(llm, [long])
    shut_down(llm)
    return answers


def storm(connector: str | None, config: dict[str, Any], seed: int, count: int, spoil: bool = False) -> dict[str, Any]:
    """``count`` random requests with shared prefixes, some aborted, on so few pages that vLLM must preempt.

    ``spoil``: what lies in host memory is noise.
    """
    from vllm import SamplingParams

    llm = start_llm(
        connector,
        config,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=48,
        block_size=32,
        max_model_len=1024,
        enable_prefix_caching=bool(seed % 2),
    )
    engine = llm.llm_engine
    random = Random(seed)
    families = [[random.randrange(100, 40000) for _ in range(random.randrange(150, 500))] for _ in range(8)]
    plan = []
    for _ in range(count):
        prefix = random.choice(families)
        prompt = prefix[: random.randrange(100, len(prefix))] if random.random() < 0.3 else prefix
        prompt = prompt + [random.randrange(100, 40000) for _ in range(random.randrange(1, 40))]
        plan.append((prompt, random.randrange(1, 24), random.random() < 0.15))
    texts: dict[str, list[int]] = {}
    reused, preempted, running, waiting, steps = 0, 0, {}, list(enumerate(plan)), 0
    scheduler = engine.engine_core.engine_core.scheduler
    while waiting or running:
        while waiting and len(running) < 12 and random.random() < 0.7:
            index, (prompt, max_tokens, abort) = waiting.pop(0)
            engine.add_request(
                str(index),
                {"prompt_token_ids": prompt},
                SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
            )
            running[str(index)] = steps + random.randrange(1, 12) if abort else None
        for name in [name for name, at in running.items() if at is not None and at <= steps]:
            engine.abort_request([name])
            del running[name]
        for output in engine.step():
            if output.finished and output.request_id in running:
                if running.pop(output.request_id) is None:  # one that is to be aborted may finish before that
                    texts[output.request_id] = list(output.outputs[0].token_ids)
                reused += (output.kv_transfer_params or {}).get("lmcache", {}).get("reused_tokens", 0)
        preempted += sum(bool(request.num_preemptions) for request in scheduler.requests.values())
        steps += 1
        if spoil and steps % 5 == 0:
            corrupt_memory()
    leaks = leaked_references() if connector else []
    free, total = free_blocks(engine)
    shut_down(llm)
    return {
        "texts": texts,
        "reused": reused,
        "preempted": preempted,
        "leaks": leaks,
        "free": free,
        "total": total,
    }


def disk_faults(directory: str, faults: list[str], connector: str = "built-in") -> dict[str, Any]:
    """Ask, hurt the disk under the running server, ask again with memory emptied so that the disk is needed."""
    from tests.vllm import disk_damage

    llm = start_llm(connector, {"local_disk": directory, "max_local_disk_size": 1.0, "chunk_size": 128})
    answers = {}
    for index, fault in enumerate(faults):
        (prompt,) = prose_prompts(llm, [400 + index])
        expected = generate(llm, [prompt])
        (shared,) = shared_engines()
        shared.saves.wait()
        storage = shared.manager.storage
        storage.flush(60)
        storage.memory.clear()
        before = shared.metrics.snapshot()
        with getattr(disk_damage, fault)(Path(directory)):
            hurt = generate(llm, [prompt])
            shared.saves.wait()
            storage.flush(60)
        after = shared.metrics.snapshot()
        answers[fault] = {
            "expected": expected,
            "hurt": hurt,
            "healed": generate(llm, [prompt]),
            "counted": {
                name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name)
            },
        }
    leaks = leaked_references()
    shut_down(llm)
    return {"answers": answers, "leaks": leaks}


def raising_calls(connector: str, config: dict[str, Any]) -> dict[str, Any]:
    """Every call that the adapter makes into the engine raises once: the request is answered all the same."""
    llm = start_llm(connector, config)
    (prompt,) = prose_prompts(llm, [600])
    expected = generate(llm, [prompt])
    (shared,) = shared_engines()
    shared.saves.wait()
    answers = {}
    for call in ("prefix_keys", "prefetch", "retrieve", "retrieve_layer", "store", "take_events"):
        with patch.object(type(shared.engine), call, side_effect=OSError(f"injected into {call}")):
            answers[call] = generate(llm, [prompt])
            shared.saves.wait()
    answers["healed"] = generate(llm, [prompt])
    leaks = leaked_references()
    shut_down(llm)
    return {"expected": expected, "answers": answers, "leaks": leaks}


def continued(config: dict[str, Any], length: int, max_tokens: int) -> dict[str, Any]:
    """A prompt, and one that goes on behind its answer: with the generated tokens kept, and computed by plain vLLM."""
    llm = start_llm("built-in", config)
    (prompt,) = prose_prompts(llm, [length])
    (first,) = generate(llm, [prompt], max_tokens)
    longer = prompt + first["tokens"] + llm.get_tokenizer().encode(" Thank you. And the shelf before it?")
    (plain,) = generate(llm, [longer], params={"lmcache.skip_load": True, "lmcache.skip_save": True})
    (reused,) = generate(llm, [longer])
    leaks = leaked_references()
    shut_down(llm)
    return {"known": length + len(first["tokens"]), "plain": plain, "reused": reused, "leaks": leaks}


def failed_load() -> dict[str, Any]:
    """A load fails under a prompt whose rest fills further chunks: what that forward computed must not be kept."""
    llm = start_llm("built-in", {"chunk_size": 128})
    short, long = prose_prompts(llm, [500, 900])
    long = short[:450] + long[450:]
    generate(llm, [short])
    (shared,) = shared_engines()
    shared.saves.wait()
    with patch.object(type(shared.engine), "retrieve", side_effect=OSError("injected")):
        hurt = generate(llm, [long])
        shared.saves.wait()
    again = generate(llm, [long])
    plain = generate(llm, [long], params={"lmcache.skip_load": True, "lmcache.skip_save": True})
    shut_down(llm)
    return {"hurt": hurt, "again": again, "plain": plain}


def layerwise(hooks: bool) -> dict[str, Any]:
    """A prompt is loaded by layers; without ``hooks`` in a step whose forward would be replayed as one graph."""
    from vllm.config import CUDAGraphMode

    from lmcache.integration.vllm import worker_side
    from lmcache.integration.vllm.layerwise import LayerwiseLoads, calls_layer_hooks

    llm = start_llm("built-in", {"use_layerwise": True})
    (prompt,) = prose_prompts(llm, [600])
    expected = generate(llm, [prompt])
    (shared,) = shared_engines()
    shared.saves.wait()
    started, start = [], LayerwiseLoads.start

    def noted(loads: LayerwiseLoads, *args: Any) -> None:
        started.append(1)
        start(loads, *args)

    def calls(context: Any) -> bool:
        return calls_layer_hooks(context if hooks else SimpleNamespace(**modes["full"]))

    modes = {
        "full": {"attn_metadata": {}, "cudagraph_runtime_mode": CUDAGraphMode.FULL},
        "piecewise": {"attn_metadata": {}, "cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE},
        "no forward": {"attn_metadata": None, "cudagraph_runtime_mode": CUDAGraphMode.NONE},
    }
    with (
        patch.object(LayerwiseLoads, "start", noted),
        patch.object(worker_side, "calls_layer_hooks", calls),
    ):
        again = generate(llm, [prompt])
    leaks = leaked_references()
    shut_down(llm)
    return {
        "expected": expected,
        "again": again,
        "by_layers": len(started),
        "calls": {name: calls_layer_hooks(SimpleNamespace(**mode)) for name, mode in modes.items()},
        "leaks": leaks,
    }


def observability(connector: str) -> dict[str, Any]:
    """The KV events that vLLM publishes, and our counters among vLLM's own metrics."""
    llm = start_llm(connector, {"enable_kv_events": True}, disable_log_stats=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    events: list[Any] = []
    scheduler.kv_event_publisher.publish = lambda batch: events.extend(batch.events)
    (prompt,) = prose_prompts(llm, [600])
    answers = generate(llm, [prompt]) + generate(llm, [prompt])
    metrics = {
        metric.name: metric.labels | {"value": metric.value}
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:lmcache_") and hasattr(metric, "value")
    }
    shut_down(llm)
    return {
        "prompt": prompt,
        "events": [
            {"tokens": event.token_ids, "block_size": event.block_size, "medium": event.medium} for event in events
        ],
        "chained": [event.parent_block_hash == before.block_hashes[-1] for before, event in pairwise(events)],
        "metrics": metrics,
        "milliseconds": [answer["reuse"]["milliseconds"] for answer in answers],
    }


def abort_while_loading(connector: str, directory: str) -> dict[str, Any]:
    """Requests that are aborted while their chunks come from a slow disk, or are on their way into the pages."""
    from vllm import SamplingParams

    llm = start_llm(connector, {"local_disk": directory, "max_local_disk_size": 1.0, "chunk_size": 128})
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    (prompt,) = prose_prompts(llm, [800])
    expected = generate(llm, [prompt])
    (shared,) = shared_engines()
    shared.saves.wait()
    shared.manager.storage.flush(60)
    read, retrieve = LocalDiskTier._read, type(shared.engine).retrieve
    steps_until_abort = [1, 2, 5, 20]
    for slow in ("disk", "pages"):
        for index, steps in enumerate(steps_until_abort):
            shared.manager.storage.memory.clear()
            with ExitStack() as patches:
                if slow == "disk":
                    patches.enter_context(patch.object(LocalDiskTier, "_read", slowly(read)))
                else:
                    patches.enter_context(patch.object(type(shared.engine), "retrieve", slowly(retrieve)))
                name = f"{slow}-{index}"
                engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=16))
                for _ in range(steps):
                    engine.step()
                engine.abort_request([name])
                while engine.has_unfinished_requests() or scheduler.has_finished_requests():
                    engine.step()
    after = generate(llm, [prompt])
    leaks = leaked_references()
    free, total = free_blocks(engine)
    shut_down(llm)
    return {"expected": expected, "after": after, "leaks": leaks, "free": free, "total": total}


def slowly(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return function(*args, **kwargs)

    return call


def main() -> None:
    name, arguments, result = sys.argv[1:]
    answer = globals()[name](**json.loads(arguments))
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
