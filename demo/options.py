"""What every demo's command line takes."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """``work`` is there and holds an empty ``log``."""

    model: Path
    dtype: str
    work: Path
    log: Path


def parse(program: str, description: str | None, work: str) -> Options:
    """The options; from here on a SIGTERM unwinds, so that servers are ended on the way out."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, see scripts/prepare_model.py")
    # In 16 bits the text can depend on how an engine cuts a prompt into steps, with its own prefix cache as with ours.
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for the log and the result")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given.work.mkdir(parents=True, exist_ok=True)
    options = Options(given.model.resolve(), given.dtype, given.work, given.work / "server.log")
    options.log.write_text("")
    return options
