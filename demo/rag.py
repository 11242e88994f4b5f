"""Questions over documents that come in another choice and order each time, as in retrieval."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from rich.table import Table

from demo.conversation import DOCUMENT, Answer

ENVIRONMENT = {"LMCACHE_ENABLE_BLENDING": "true", "LMCACHE_BLEND_MIN_TOKENS": "128"}

# What a single request may ask of the cache: in ``kv_transfer_params`` of vLLM, in ``custom_params`` of SGLang.
WITHOUT_CACHE = {"lmcache.skip_load": True, "lmcache.skip_save": True}
INSTRUCTION = "You are the clerk of the harbour office. Answer in one sentence from these parts of the handbook."
# The handbook has six parts; each question is asked over some of them.
ASKED: list[tuple[str, tuple[int, ...]]] = [
    ("How long is the north pier?", (1, 3, 5)),
    ("How many passengers does the ferry carry?", (5, 2, 6, 4)),
    ("What is the storm signal?", (6, 3, 1, 4)),
    ("Who is the harbour master?", (4, 1, 5, 3, 6)),
    ("What does the lighthouse stand on?", (2, 6, 1)),
]
WAYS: dict[str, dict[str, Any]] = {
    "no reuse": WITHOUT_CACHE,
    "prefix reuse": {"lmcache.blend": False},
    "CacheBlend": {},
}


@dataclass(frozen=True)
class AskedQuestion:
    """One answer a way; ``all_known``: every part had been in an earlier question."""

    parts: tuple[int, ...]
    all_known: bool
    answers: dict[str, Answer]


class AskAWay(Protocol):
    """Sends one chat, greedily; ``params`` are what the request says to us, ``salt`` is its way's own cache."""

    def __call__(
        self, question: str, messages: list[dict[str, str]], *, params: dict[str, Any], salt: str
    ) -> Answer: ...


def ask_in_all_ways(ask: AskAWay) -> Iterator[AskedQuestion]:
    """Each way has a cache of its own, and learns the documents from its own earlier questions."""
    texts = re.split(r"\n(?=Part )", DOCUMENT.read_text())
    seen: set[int] = set()
    for question, parts in ASKED:
        documents = "\n\n".join(texts[part].strip() for part in parts)
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"{documents}\n\n{question}"},
        ]
        answers = {way: ask(question, messages, params=params, salt=way) for way, params in WAYS.items()}
        yield AskedQuestion(parts, seen.issuperset(parts), answers)
        seen.update(parts)


@dataclass(frozen=True)
class RagResult:
    questions: list[AskedQuestion]

    def table(self) -> Table:
        table = Table(title="Six documents, another choice and order for each question", title_justify="left")
        table.add_column("question, parts of the handbook; answer")
        for name in ("prompt\ntokens", "tokens\nreused", "of these\nrecomputed", "seconds to\nfirst token", "ratio"):
            table.add_column(name, justify="right")
        for asked in self.questions:
            plain = asked.answers["no reuse"]
            parts = ", ".join(map(str, asked.parts))
            table.add_row(
                f"[bold]{plain.question}[/bold] parts {parts}" + ("" if asked.all_known else " [dim](some new)")
            )
            for way, answer in asked.answers.items():
                table.add_row(
                    f"  {way}: [dim]{' '.join(answer.text.split())[:60]}",
                    f"{answer.prompt_tokens:,}",
                    f"{answer.reused_tokens:,}",
                    f"{answer.recomputed_tokens:,}",
                    f"{answer.seconds_to_first_token:.2f}",
                    f"{plain.seconds_to_first_token / answer.seconds_to_first_token:.1f}×",
                )
            table.add_section()
        return table

    def median_ratio(self) -> float:
        """How many times sooner the first token comes with CacheBlend where every document was known."""
        return median(
            asked.answers["no reuse"].seconds_to_first_token / asked.answers["CacheBlend"].seconds_to_first_token
            for asked in self.questions
            if asked.all_known
        )

    def problems(self) -> list[str]:
        """What must not be: an answer missing, other text with exact reuse, or nothing reused."""
        found = []
        for asked in self.questions:
            plain, prefix, blended = (asked.answers[way] for way in WAYS)
            if not blended.text.strip():
                found.append(f"{plain.question!r}: no answer with CacheBlend")
            if prefix.text != plain.text:
                found.append(f"{plain.question!r}: prefix reuse says {prefix.text!r}, without it is {plain.text!r}")
            if asked.all_known and blended.reused_tokens < blended.prompt_tokens / 2:
                found.append(f"{plain.question!r}: CacheBlend reused only {blended.reused_tokens} tokens")
        return found
