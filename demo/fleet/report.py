"""What came from where."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from demo.conversation import Answer


@dataclass(frozen=True)
class Row:
    """One question to one of the servers."""

    step: str
    server: str
    parts: tuple[int, ...]
    answer: Answer


@dataclass(frozen=True)
class FleetResult:
    """``problems`` are what must not be."""

    rows: list[Row]
    problems: list[str]

    def table(self) -> Table:
        table = Table(title="Two vLLM servers and a Redis", title_justify="left")
        table.add_column("what")
        table.add_column("server")
        for name in ("prompt\ntokens", "from its\nmemory", "from\nRedis", "computed", "seconds to\nfirst token"):
            table.add_column(name, justify="right")
        for row in self.rows:
            answer = row.answer
            tiers = answer.tokens_by_tier
            computed = answer.prompt_tokens - answer.reused_tokens + answer.recomputed_tokens
            table.add_row(
                f"{row.step} [dim]{', '.join(map(str, row.parts))}",
                row.server,
                *(f"{number:,}" for number in (answer.prompt_tokens, tiers.get("memory", 0), tiers.get("remote", 0))),
                f"{computed:,}",
                f"{answer.seconds_to_first_token:.2f}",
            )
        return table
