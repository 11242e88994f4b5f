"""Measures this machine and writes the figures into ``docs/benchmarks.md`` and ``docs/images``: ``make bench``.

python benchmarks/write_docs.py              measure, then write (about four minutes)
python benchmarks/write_docs.py FILE         write the figures of an earlier ``lmcache bench --json FILE``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from lmcache.bench.plot import plot
from lmcache.bench.report import Report
from lmcache.bench.table import HEADERS, cells

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- figures: written by benchmarks/write_docs.py -->", "<!-- end of figures -->"


def markdown(report: Report) -> str:
    """A table a subject."""
    lines = [f"Machine: {report.machine}. Measuring took {report.seconds:.0f} s."]
    lines += [f"Not measured: {note}." for note in report.notes]
    for subject, rows in groupby(report.rows, key=lambda row: row.subject):
        table = [HEADERS, ("---",) * len(HEADERS), *map(cells, rows)]
        lines += ["", f"### {subject}", "", *(f"| {' | '.join(line)} |" for line in table)]
    return "\n".join(lines)


def measure() -> Report:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "figures.json"
        run = "from lmcache.cli.main import app; app()"
        subprocess.run([sys.executable, "-c", run, "bench", "all", "--json", str(file)], check=True)
        return Report.from_json(file.read_bytes())


def main() -> None:
    report = Report.from_json(Path(sys.argv[1]).read_bytes()) if len(sys.argv) > 1 else measure()
    page = DOCS / "benchmarks.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(report)}\n\n{END}{after}", encoding="utf-8")
    plot(report.rows, DOCS / "images")


if __name__ == "__main__":
    main()
