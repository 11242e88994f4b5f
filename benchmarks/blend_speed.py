"""How long a blend takes beside a full prefill of the same prompt, through transformers on one core.

python benchmarks/blend_speed.py --model DIR [--tokens 2000] [--runs 7] [--json FILE]

Full prefill is the model's own forward, nothing of ours in it. Blends and prefill take turns in one run; a ratio is
taken in each turn by itself, and its median over the turns is told with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmcache.bench.machine import describe_machine
from lmcache.bench.timing import Work, share, take_turns
from lmcache.integration.transformers import CacheBlend

# Charged budget and the most that such a blend may take of a full prefill; and what deciding may take of a blend.
TARGETS = {0.15: 0.25, 0.05: 0.15}
MAX_OVERHEAD = 0.03


def prompt_parts(tokens: int, vocabulary: int) -> list[torch.Tensor]:
    """A system part, six passages of equal length, a question of 40 tokens: random tokens, ``tokens`` in all."""
    drawn = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    passages = (tokens - 80) // 6
    return list(drawn.split([tokens - 40 - 6 * passages, *[passages] * 6, 40]))


def measure(model: PreTrainedModel, tokens: int, runs: int) -> dict[str, object]:
    system, *passages, question = prompt_parts(tokens, model.config.vocab_size)
    prompt = [system, *reversed(passages), question]
    ids = torch.cat(prompt)[None]
    with CacheBlend(model) as blend:
        for passage in passages:
            blend.cache(passage, behind=system)
        phases: dict[float, list[dict[str, float]]] = {budget: [] for budget in TARGETS}

        def blended(budget: float) -> Callable[[], object]:
            def run() -> object:
                result = blend.prefill(prompt, ratio=budget)
                assert result.report.fallback is None
                phases[budget].append(result.report.seconds)
                return result

            return run

        works = {"full prefill": Work(lambda: model(ids, use_cache=True, logits_to_keep=1))}
        works |= {f"blend {budget:.0%}": Work(blended(budget)) for budget in TARGETS}
        with torch.no_grad():
            taken = take_turns(works, runs)
    rows = []
    for budget, most in TARGETS.items():
        ours = taken[f"blend {budget:.0%}"]
        relative = share(taken["full prefill"], ours)  # ours over the full prefill
        deciding = statistics.median(run["plan"] / sum(run.values()) for run in phases[budget][1:])
        by_phase = {name: statistics.median(run[name] for run in phases[budget][1:]) for name in phases[budget][0]}
        rows.append(
            {
                "budget": budget,
                "seconds": statistics.median(ours),
                "of_full_prefill": relative.median,
                "quartiles": [relative.low, relative.high],
                "at_most": most,
                "deciding": deciding,
                "phases": by_phase,
            }
        )
    return {
        "machine": describe_machine(),
        "model": model.config._name_or_path,
        "dtype": str(model.dtype),
        "tokens": tokens,
        "full_prefill_seconds": statistics.median(taken["full prefill"]),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    figures = measure(model, arguments.tokens, arguments.runs)
    print(f"{figures['machine']}\n{arguments.tokens} tokens, full prefill {figures['full_prefill_seconds']:.2f} s")
    for row in figures["rows"]:
        low, high = row["quartiles"]
        phases = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in row["phases"].items())
        print(
            f"blend {row['budget']:.0%}: {row['seconds']:.2f} s, {row['of_full_prefill']:.3f} of it "
            f"({low:.3f}–{high:.3f}; at most {row['at_most']}), "
            f"deciding {row['deciding']:.1%} (at most {MAX_OVERHEAD:.0%}); ms: {phases}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
