"""Writes the figures under ``benchmarks/gpu/results`` into ``docs/performance.md`` and ``docs/images``.

    python -m benchmarks.gpu.write_docs

Every ``*.json`` there is what one of the benchmarks left, under any name; of one that is missing the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plots import plot_poisson, plot_ttft
from benchmarks.gpu.setup import GRAPH_LABELS, LABELS, OFFLOADING, OURS, PLAIN, SERVER
from benchmarks.gpu.ttft import BLENDS, EXACT_RELOAD, RELOAD

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks/gpu/results", ROOT / "docs/performance.md", ROOT / "docs/images"
SLOWEST_P99 = 1.0

Found = dict[str, Any]


class Cells:
    """The cells of one file, by variant and kind."""

    def __init__(self, found: Found) -> None:
        self.all: list[Found] = found["cells"]

    def get(self, variant: str, kind: str, tokens: int | None = None) -> Found | None:
        for cell in self.all:
            if (cell["variant"], cell["kind"]) == (variant, kind) and tokens in (None, cell.get("tokens")):
                return cell
        return None

    def seconds(self, variant: str, kind: str, tokens: int) -> str:
        return seconds(self.get(variant, kind, tokens), self.get(PLAIN, "cold", tokens))


def seconds(cell: Found | None, plain: Found | None) -> str:
    """The median, and how it stands to plain vLLM's."""
    if cell is None:
        return "not measured"
    text = f"{cell['seconds']:.3f}"
    if plain is not None and plain is not cell:
        text += f" ({share(cell, plain)})"
    return marked(text, cell)


def share(cell: Found, plain: Found) -> str:
    """A new prompt's time as a ratio, a known one's as a factor of speed."""
    ratio = cell["seconds"] / plain["seconds"]
    return f"{ratio:.3f} of plain" if cell["kind"] == "cold" else f"{1 / ratio:.1f}×"


def marked(text: str, cell: Found) -> str:
    """A figure of something else than its name says is shown, and said to be."""
    return text if cell.get("sound", True) else f"{text} – not sound"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def about(found: Found) -> list[str]:
    settings = found["settings"]
    mode = GRAPH_LABELS.get(settings.get("graphs"), "eager")
    lines = [f"Measured {found['measured']}, {mode}: {found['machine']}."]
    copies = next((run["pinned_copy_gb_s"] for run in found["variants"].values() if run.get("pinned_copy_gb_s")), None)
    if copies:
        lines.append(
            f"Plain copies of pinned memory: {', '.join(f'{name} {by:.1f} GB/s' for name, by in copies.items())}."
        )
    lines += [f"Ended early: {LABELS[one['variant']]} (exit status {one['exit']})." for one in found["failures"]]
    return ["\n".join(lines), ""]


def ttft(found: Found, name: str) -> list[str]:
    cells = Cells(found)
    lengths = sorted({cell["tokens"] for cell in cells.all})
    lines = [
        *about(found),
        f"Medians of {found['settings']['runs']} runs, in seconds.",
        "",
        f"![Seconds to first token](images/{name}.png)",
    ]
    prefix = [(OFFLOADING, "cold"), (OURS, "cold"), (OFFLOADING, RELOAD), (OURS, RELOAD), (OURS, EXACT_RELOAD)]
    header = [
        "tokens",
        "plain vLLM",
        *(f"{kind.replace('cold', 'new')}: {LABELS[variant]}" for variant, kind in prefix),
        "bytes at copy speed",
    ]
    rows = [
        [
            f"{length:,}",
            cells.seconds(PLAIN, "cold", length),
            *(cells.seconds(variant, kind, length) for variant, kind in prefix),
            floor(found, length),
        ]
        for length in lengths
    ]
    lines += ["", "### New prompts and known ones", *table(header, rows)]
    header = ["tokens", "plain vLLM", *BLENDS]
    rows = [
        [f"{length:,}", *(cells.seconds(*at, length) for at in [(PLAIN, "cold"), *((OURS, kind) for kind in BLENDS)])]
        for length in lengths
    ]
    lines += ["### Known documents in a new order", *table(header, rows)]
    ours = [cell for cell in cells.all if cell["variant"] == OURS and cell["milliseconds"]]
    blended = [cell for kind in BLENDS for cell in ours if cell["kind"] == kind]
    if blended:
        phases = list(blended[0]["milliseconds"])
        header = ["blend", "tokens", *phases]
        rows = [
            [cell["kind"], f"{cell['tokens']:,}", *(f"{cell['milliseconds'].get(phase, 0.0):.1f}" for phase in phases)]
            for cell in blended
        ]
        lines += ["### Where a blend's milliseconds go", *table(header, rows)]
    lines += through_server(cells, lengths)
    plot_ttft(cells.all, IMAGES / f"{name}.png")
    return lines


def through_server(cells: Cells, lengths: Sequence[int]) -> list[str]:
    """The same cells with and without ``lmcache server``, side by side."""
    kinds = [kind for kind in ("cold", RELOAD, *BLENDS) if any(cells.get(SERVER, kind, length) for length in lengths)]
    if not kinds:
        return []
    rows = []
    for length in lengths:
        row = [f"{length:,}"]
        for kind in kinds:
            both = [cells.get(variant, kind, length) for variant in (OURS, SERVER)]
            row.append(" / ".join("–" if cell is None else marked(f"{cell['seconds']:.3f}", cell) for cell in both))
        rows.append(row)
    header = ["tokens", *(kind.replace("cold", "new") for kind in kinds)]
    note = "Each field: in the engine's own memory / in that of an `lmcache server`."
    return ["### Through a server", "", note, *table(header, rows)]


def floor(found: Found, tokens: int) -> str:
    for run in found["variants"].values():
        if speed := run.get("pinned_copy_gb_s", {}).get("host to device"):
            return f"{tokens * run['kv_bytes_per_token'] / speed / 1e9:.3f}"
    return "–"


def decode(found: Found, name: str) -> list[str]:
    cells = Cells(found)
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells.all))
    variants = list(dict.fromkeys(cell["variant"] for cell in cells.all))
    rows = []
    for kind in kinds:
        row, plain = [kind], cells.get(PLAIN, kind)
        for variant in variants:
            cell = cells.get(variant, kind)
            if cell is None:
                row.append("not measured")
                continue
            text = f"{cell['tokens_a_second']:,.0f}"
            if plain is not None and plain is not cell:
                text += f" ({cell['tokens_a_second'] / plain['tokens_a_second']:.3f} of plain)"
            row.append(marked(text, cell))
        rows.append(row)
    runs = f"Medians of {found['settings']['runs']} runs, in tokens a second."
    return [*about(found), runs, *table(["beside", *(LABELS[variant] for variant in variants)], rows)]


def poisson(found: Found, name: str) -> list[str]:
    cells = Cells(found)
    variants = list(dict.fromkeys(cell["variant"] for cell in cells.all))
    rates = sorted({cell["rate"] for cell in cells.all})
    rows = []
    for rate in rates:
        row = [f"{rate:g}"]
        for variant in variants:
            cell = cells.get(variant, f"{rate:g} a second")
            row.append(
                "–"
                if cell is None
                else marked(f"{cell['p50']:.3f} / {cell['p99']:.3f} / {cell['served_a_second']:.1f}", cell)
            )
        rows.append(row)
    lines = [
        *about(found),
        f"![Time to first token under load](images/{name}.png)",
        "",
        "Each field: seconds to first token at the 50th and 99th percentile, requests served a second. "
        "–: not offered, since a lower rate was too much already.",
        *table(["requests a second", *(LABELS[variant] for variant in variants)], rows),
        f"The highest of these rates at which the 99th percentile stayed within {SLOWEST_P99:g} s:",
    ]
    far = [f"{LABELS[variant]} {reached(cells.all, variant)}" for variant in variants]
    plot_poisson(cells.all, SLOWEST_P99, IMAGES / f"{name}.png")
    return [*lines, f"{', '.join(far)}."]


def reached(cells: list[Found], variant: str) -> str:
    good = [cell["rate"] for cell in cells if cell["variant"] == variant and cell["p99"] <= SLOWEST_P99]
    return f"{max(good):g} a second" if good else "none"


def attention(found: Found, name: str) -> list[str]:
    ways = list(dict.fromkeys(way for cell in found["cells"] for way in cell["tflops"]))
    rows = []
    for cell in found["cells"]:
        rates = cell["tflops"]
        ours = max(rate for way, rate in rates.items() if way.startswith("ours"))
        best = max((rate for way, rate in rates.items() if not way.startswith("ours")), default=None)
        share = "–" if best is None else f"{ours / best:.0%}"
        each = [f"{rates[way]:.0f}" if way in rates else "–" for way in ways]
        rows.append([f"{cell['tokens']:,}", f"{cell['share']:.0%}", *each, share])
    header = ["tokens", "queries", *ways, "ours of the faster FlashAttention"]
    return [f"Measured {found['measured']}: {found['machine']}. In TFLOP/s.", *table(header, rows)]


SECTIONS: dict[str, Callable[[Found, str], list[str]]] = {
    "ttft": ttft,
    "attention": attention,
    "decode": decode,
    "poisson": poisson,
}


def section(benchmark: str, files: dict[str, Found]) -> str:
    """Everything that was measured with ``benchmark``."""
    mine = {name: found for name, found in files.items() if found["benchmark"] == benchmark and found["cells"]}
    if not mine:
        return "Not measured yet."
    parts = ["\n".join(SECTIONS[benchmark](found, f"gpu-{name}")).strip() for name, found in mine.items()]
    if len(parts) > 1:
        machines = (found["machine"].partition(",")[0] for found in mine.values())
        parts = [f"### {name}\n\n{part.replace('### ', '#### ')}" for name, part in zip(machines, parts, strict=True)]
    return "\n\n".join(parts)


def main() -> None:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    files = {name: found for name, found in files.items() if not found["settings"].get("tiny")}
    IMAGES.mkdir(parents=True, exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    for benchmark in SECTIONS:
        begin, end = f"<!-- {benchmark}: written by benchmarks/gpu/write_docs.py -->", f"<!-- end of {benchmark} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE} has no place for {benchmark}: {begin} … {end}")
        page = f"{before}{begin}\n\n{section(benchmark, files)}\n\n{end}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
