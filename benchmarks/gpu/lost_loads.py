"""What vLLM answers where KV that was promised to it does not come: held against full prefill.

    python -m benchmarks.gpu.lost_loads --model FOLDER [--tasks 8] [--graphs none]

The tasks of ``lmcache evaluate``, blended, with a fault put into every blend. ``computed``: as it is, the worker role
computes what was lost before vLLM's forward. ``left to vLLM``: it is told of the blocks afterwards, as a connector may
do (vLLM issue 49250 is about what becomes of it). ``again``: full prefill once more. Shares of tokens that are those of
full prefill, 24 a task.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from benchmarks.gpu.engine import machine
from benchmarks.gpu.quality import EXACT, EXTRA, MAX_TOKENS, RATIO, ModelEngine, Prompt, all_parts
from benchmarks.gpu.setup import BLEND, Setup, add_graphs

COMPUTED, LEFT, AGAIN = "computed", "left to vLLM", "again"


def measure(engine: ModelEngine, model: Path, tasks: int) -> dict[str, list[float]]:
    from lmcache.evaluation.measures import token_agreement
    from lmcache.integration.vllm.blend.blender import Blender
    from lmcache.integration.vllm.lost_loads import LostLoads

    found: dict[str, list[float]] = {COMPUTED: [], LEFT: [], AGAIN: []}
    for parts in all_parts(model, tasks):
        engine.store(parts)
        prompt = Prompt.of(parts.system_ids, parts.passage_ids, parts.question_ids)
        exact = {**EXACT, "lmcache.skip_save": True}
        blended = {"lmcache.blend_ratio": RATIO, "lmcache.segments": prompt.segments, "lmcache.skip_save": True}
        (reference,) = engine.answers([(prompt, exact)])
        for name, params in ((COMPUTED, blended), (LEFT, blended), (AGAIN, exact)):
            with ExitStack() as faults:
                faults.enter_context(patch.object(Blender, "_blend", side_effect=OSError("a fault")))
                if name == LEFT:
                    faults.enter_context(patch.object(LostLoads, "_compute", side_effect=OSError("not here")))
                (reply,) = engine.answers([(prompt, params)])
            found[name].append(token_agreement(reference.tokens, reply.tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for lost_loads.txt")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="vLLM for CPUs, in float32: tries this script out")
    add_graphs(parser)
    options = parser.parse_args()
    extra = json.dumps({f"lmcache.{key}": value for key, value in EXTRA.items()})
    setup = Setup(BLEND, 2, MAX_TOKENS, MAX_TOKENS, False, graphs=options.graphs, tiny=options.cpu, extra=extra)
    dtype = "float32" if options.cpu else "bfloat16"
    engine = ModelEngine(setup, options.model, dtype=dtype, gpu_memory_utilization=0.3)
    found = measure(engine, options.model, options.tasks)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [f"{machine()}; {options.tasks} tasks"]
    lines += [
        f"{name:14}{statistics.mean(values):6.3f}  {[round(value, 2) for value in values]}"
        for name, values in found.items()
    ]
    (options.out / "lost_loads.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
