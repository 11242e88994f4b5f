"""CacheBlend in a real vLLM, as it serves. Each function runs in its own process; see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from lmcache.blend.chunk_source import ChunkSource
from lmcache.blend.correctors.kriging import KrigingCorrector
from lmcache.blend.find_passages import PassageFinder
from lmcache.blend.passage_lease import PassageLease
from lmcache.blend.policies.sampled_attention import SampledAttentionPolicy
from lmcache.blend.rope import FusedRope
from lmcache.integration.vllm import worker_side
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.block_hashes import SaltedBlockHashes
from lmcache.integration.vllm.blend.host import VLLMHost
from lmcache.integration.vllm.blend.scheduling import BlendScheduling
from lmcache.paging.paged_connector import PagedConnector
from tests.vllm.scenarios import (
    corrupt_memory,
    free_blocks,
    generate,
    leaked_references,
    shared_engines,
    shut_down,
    start_llm,
)

CONFIG = {"enable_blending": True, "chunk_size": 64, "blend_min_tokens": 64}
OPTIONS = {"block_size": 32, "max_model_len": 2048}
PLAIN = {"lmcache.blend": False, "lmcache.skip_load": True, "lmcache.skip_save": True}
FARTHEST = {"lmcache.blend_policy": "none", "lmcache.blend_corrector": "none", "lmcache.skip_save": True}
"""A blend that recomputes nothing: as far from a full prefill as one can be."""


class Library:
    """Documents behind a system prompt, and questions over some of them in any order."""

    def __init__(self, llm: Any, documents: int = 6, seed: int = 0) -> None:
        self._encode = llm.get_tokenizer().encode
        self._random = Random(seed)
        self.system = self._encode("You are a careful librarian who answers every question in one short sentence.\n\n")
        self.documents = [self._document(number) for number in range(documents)]

    def _document(self, number: int) -> list[int]:
        topics = ("ships", "birds", "stars", "bridges", "tea", "maps", "clocks")
        facts = " ".join(
            f"Shelf {n} of room {number} holds {(n * 7919 + number * 104729) % 997} books "
            f"about {topics[(n + number) % 7]}."
            for n in range(11)
        )
        return self._encode(f"Room {number}. {facts}\n\n")

    def prompt(self, count: int = 4) -> list[int]:
        chosen = self._random.sample(range(len(self.documents)), count)
        question = f"Question: how many books are on shelf {self._random.randrange(11)} of room {chosen[0]}? Answer:"
        return [*self.system, *(token for at in chosen for token in self.documents[at]), *self._encode(question)]

    def warm(self, llm: Any) -> None:
        """Let every document be seen once, at the end of a prompt of its own."""
        for document in self.documents:
            generate(llm, [[*self._encode("Remember this. "), *document]], 1, {"lmcache.blend": False})
        shared_engines()[0].saves.wait()


def served(connector: str, prompts: int, rows: int) -> dict[str, Any]:
    """Prompts at ratio 1.0 against full prefill, alone and in batches, in pieces of ``rows``; then with noise as KV."""
    llm = start_llm(
        connector, CONFIG, **OPTIONS, max_num_batched_tokens=rows, max_num_seqs=16, enable_prefix_caching=True
    )
    library = Library(llm)
    library.warm(llm)
    all_rows = {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True}
    pairs = []
    for _ in range(prompts):
        prompt = library.prompt()
        llm.reset_prefix_cache()
        expected = generate(llm, [prompt], 32, PLAIN)[0]
        llm.reset_prefix_cache()
        pairs.append((expected, generate(llm, [prompt], 32, all_rows)[0]))
    together = [library.prompt() for _ in range(3)]
    llm.reset_prefix_cache()
    apart = [generate(llm, [prompt], 16, PLAIN)[0] for prompt in together]
    llm.reset_prefix_cache()
    in_steps: list[list[int]] = []
    blend = Blender.run

    def noted(blender: Blender, requests: Any) -> Any:
        in_steps.append([request.prepared.num_computed for request in requests])
        return blend(blender, requests)

    with patch.object(Blender, "run", noted):
        mixed = _together(llm, together, [all_rows, PLAIN, all_rows])
    # vLLM's prefix cache holds the system prompt and a document: the blend begins behind them.
    behind = [*library.system, *library.documents[0], *library.documents[1], *library.documents[2], *together[0][-12:]]
    llm.reset_prefix_cache()
    expected_behind = generate(llm, [behind], 16, PLAIN)[0]
    llm.reset_prefix_cache()
    generate(llm, [[*library.system, *library.documents[0], *library.documents[4]]], 1, PLAIN)
    found_behind = generate(llm, [behind], 16, all_rows)[0]
    leaks = leaked_references()
    corrupt_memory()
    noise = {}
    for name, params in (("all", all_rows), ("none", FARTHEST)):
        llm.reset_prefix_cache()
        noise[name] = generate(llm, [together[0]], 16, params)[0]
    return {
        "pairs": pairs,
        "apart": apart,
        "mixed": mixed,
        "in_steps": in_steps,
        "behind": [expected_behind, found_behind],
        "noise": noise,
        "leaks": leaks,
    }


def _together(llm: Any, prompts: list[list[int]], params: list[dict[str, Any]], max_tokens: int = 16) -> list[Any]:
    """All in flight at once, each with parameters of its own."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, extra_args={"kv_transfer_params": one})
        for one in params
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [max(entry.logprob for entry in at.values()) for at in output.outputs[0].logprobs],
            "reuse": (output.kv_transfer_params or {}).get("lmcache", {}),
        }
        for output in outputs
    ]


def attacks(salted: bool) -> dict[str, Any]:
    """Every way by which a plain request could be served with blended KV; ``salted`` False takes the defence away."""
    config = {**CONFIG, "save_decode_cache": True}
    llm = start_llm("built-in", config, **OPTIONS, enable_prefix_caching=True)
    library = Library(llm, documents=7)
    library.warm(llm)
    prefix_only = {"lmcache.blend": False, "lmcache.skip_save": True}
    keeping = {key: value for key, value in FARTHEST.items() if key != "lmcache.skip_save"}
    found: dict[str, Any] = {}

    def reference(prompt: list[int]) -> Any:
        llm.reset_prefix_cache()
        answer = _together(llm, [prompt], [PLAIN])[0]
        llm.reset_prefix_cache()
        return answer

    with patch.object(SaltedBlockHashes, "apply", SaltedBlockHashes.apply if salted else lambda *_: None):
        for name, order in (
            ("after", [[keeping], [PLAIN]]),
            ("twice", [[keeping], [keeping], [PLAIN], [PLAIN]]),
            ("together, blended first", [[keeping, PLAIN]]),
            ("together, plain first", [[PLAIN, keeping]]),
            ("two blended at once", [[keeping, keeping], [PLAIN]]),
            ("our prefix keys", [[keeping], [prefix_only]]),
        ):
            prompt = library.prompt()
            expected, answers, blended = reference(prompt), [], 0
            for batch in order:
                for params, answer in zip(batch, _together(llm, [prompt] * len(batch), batch), strict=True):
                    if params is keeping:
                        blended += bool((answer["reuse"]["blend"] or {}).get("segments"))
                    else:
                        answers.append(answer)
                shared_engines()[0].saves.wait()
            found[name] = {"expected": expected, "answers": answers, "blended": blended}
        # What was generated behind blended KV, as the prompt of somebody else.
        prompt = library.prompt()
        (answer,) = _together(llm, [prompt], [keeping], 80)
        shared_engines()[0].saves.wait()
        longer = prompt + answer["tokens"]
        found["continued"] = {"answers": _together(llm, [longer] * 2, [PLAIN, prefix_only]), "blended": 1}
        found["continued"]["expected"] = reference(longer)
    return found


FAULTS: dict[str, Any] = {
    "find": (PassageFinder, "find"),
    "lease": (PassageLease, "take"),
    "promise": (BlendScheduling, "promise"),
    "salt": (SaltedBlockHashes, "apply"),
    "policy": (SampledAttentionPolicy, "select"),
    "source": (ChunkSource, "copy_into"),
    "rope": (FusedRope, "fused_encode"),
    "corrector": (KrigingCorrector, "correct"),
    "host": (VLLMHost, "forward"),
    "pages": (PagedConnector, "write_tokens"),
    "report": (worker_side, "report_of"),
}


def faults() -> dict[str, Any]:
    """An exception at every step of a blend, at its first call and at a later one."""
    llm = start_llm("built-in", CONFIG, **OPTIONS)
    library = Library(llm)
    library.warm(llm)
    params = {"lmcache.skip_save": True}
    found = {}
    for name, (owner, attribute) in FAULTS.items():
        for at in (0, 5):
            prompt = library.prompt(3)
            expected = generate(llm, [prompt], 12, PLAIN)[0]
            broken = _FailsAt(getattr(owner, attribute), at)
            with patch.object(owner, attribute, broken.method):
                answer = generate(llm, [prompt], 12, params)[0]
            after = generate(llm, [prompt], 1, params)[0]
            found[f"{name}, call {at}"] = {
                "failed": broken.failed,
                "expected": expected["tokens"],
                "tokens": answer["tokens"],
                "reused": (answer["reuse"]["reused_tokens"], expected["reuse"]["reused_tokens"]),
                "segments": len((answer["reuse"].get("blend") or {}).get("segments", [])),
                "blends_again": bool((after["reuse"]["blend"] or {}).get("segments")),
            }
    (shared,) = shared_engines()
    return {
        "answers": found,
        "leaks": leaked_references() + list(map(repr, shared.prepared_blends)),
        "reports": len(shared.blend_reports),
        "metrics": shared.metrics.snapshot(),
    }


class _FailsAt:
    """A function that raises at its ``at``-th call."""

    def __init__(self, function: Any, at: int) -> None:
        self.failed = False

        def method(*arguments: Any, **named: Any) -> Any:
            nonlocal at
            at -= 1
            if at == -1:
                self.failed = True
                raise RuntimeError("a fault that a test put here")
            return function(*arguments, **named)

        self.method = method


def storm(blending: bool, count: int) -> dict[str, Any]:
    """``count`` random requests, some blended, some aborted, on so few pages that vLLM must preempt."""
    from vllm import SamplingParams

    few = {"max_num_seqs": 6, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 56, "block_size": 32}
    llm = start_llm("built-in" if blending else None, CONFIG, **few, max_model_len=1024, enable_prefix_caching=True)
    library = Library(llm, documents=8)
    if blending:
        library.warm(llm)
    random = Random(5)
    plan = []
    for _ in range(count):
        ratio = random.choice([None, None, 0.0, 0.1])  # half of them are plain
        params = {"lmcache.blend": False} if ratio is None else {"lmcache.blend_ratio": ratio}
        plan.append((library.prompt(random.randrange(1, 4)), random.randrange(1, 16), random.random() < 0.15, params))
    engine, waiting = llm.llm_engine, list(enumerate(plan))
    scheduler = engine.engine_core.engine_core.scheduler
    texts: dict[str, list[int]] = {}
    running: dict[str, int | None] = {}
    blended, preempted, steps = 0, 0, 0
    while waiting or running:
        while waiting and len(running) < 9 and random.random() < 0.7:
            index, (prompt, max_tokens, abort, params) = waiting.pop(0)
            extra = {"kv_transfer_params": params} if blending else None
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
            running[str(index)] = steps + random.randrange(1, 12) if abort else None
        for name in [name for name, at in running.items() if at is not None and at <= steps]:
            engine.abort_request([name])
            del running[name]
        for output in engine.step():
            if output.finished and output.request_id in running and running.pop(output.request_id) is None:
                report = (output.kv_transfer_params or {}).get("lmcache", {})
                blended += bool((report.get("blend") or {}).get("segments"))
                if "lmcache.blend" in plan[int(output.request_id)][3]:
                    texts[output.request_id] = list(output.outputs[0].token_ids)
        preempted += sum(bool(request.num_preemptions) for request in scheduler.requests.values())
        steps += 1
    free, total = free_blocks(engine)
    leaks = leaked_references() if blending else []
    shared = shared_engines()
    held = [*shared[0].prepared_blends, *shared[0].blend_reports] if blending else []
    return {
        "texts": texts,
        "blended": blended,
        "preempted": preempted,
        "leaks": leaks + held,
        "free": free,
        "total": total,
    }


def separated() -> dict[str, Any]:
    """Passages between separators, in another order; then a request that names its own, and ones that cannot be."""
    llm = start_llm("built-in", {**CONFIG, "blend_segmentation": "separator", "blend_min_tokens": 48}, **OPTIONS)
    encode, decode = llm.get_tokenizer().encode, llm.get_tokenizer().decode
    library = Library(llm)
    texts = [decode(document).strip() for document in library.documents[:3]]
    generate(llm, [encode(" # # ".join(["You are a librarian.", *texts, "Which room?"]))], 1)
    shared_engines()[0].saves.wait()
    prompt = encode(" # # ".join(["You are a poet.", texts[2], texts[0] + " And more.", "Which shelf?"]))
    found: dict[str, Any] = {"separator": generate(llm, [prompt], 4, {"lmcache.skip_save": True})[0]}
    found["texts"] = [
        decode(prompt[segment["start"] : segment["end"]])
        for segment in found["separator"]["reuse"]["blend"]["segments"]
    ]
    found["passages"] = texts
    start = decode(prompt).index(texts[2])
    named = [{"start": start, "end": start + len(texts[2]), "unit": "char"}]
    for name, params in (
        ("named", {"lmcache.segments": named}),
        ("out of range", {"lmcache.segments": [{"start": 5, "end": 99_999}]}),
        ("ratio", {"lmcache.blend_ratio": 7}),
        ("policy", {"lmcache.blend_policy": "magic"}),
    ):
        found[name] = generate(llm, [prompt], 4, {**params, "lmcache.skip_save": True})[0]
    found["plain"] = generate(llm, [prompt], 4, PLAIN)[0]
    return found


def on_disk(directory: str, warm: bool) -> dict[str, Any]:
    """Documents are read in by one server and asked about by the next."""
    llm = start_llm("built-in", {**CONFIG, "local_disk": directory, "max_local_disk_size": 1}, **OPTIONS)
    library = Library(llm)
    (shared,) = shared_engines()
    if warm:
        library.warm(llm)
        shared.manager.storage.flush(60)
        shut_down(llm)
        return {"known": len(shared.manager.passages)}
    assert shared.manager.passages.loaded.wait(30)
    prompt = library.prompt()
    expected = generate(llm, [prompt], 16, PLAIN)[0]
    blended = generate(llm, [prompt], 16, {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True})[0]
    return {
        "known": len(shared.manager.passages),
        "expected": expected,
        "blended": blended,
        "leaks": leaked_references(),
    }


def main() -> None:
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
