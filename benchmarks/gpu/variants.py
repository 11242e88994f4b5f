"""Every variant runs in a process of its own, one after the other; what they find is kept as soon as it is found."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

Cell = dict[str, Any]


def run_variants(
    benchmark: str, names: list[str], out: Path, settings: dict[str, Any], limit: float, line: Callable[[Cell], str]
) -> None:
    """Start this module once for each variant; print a ``line`` a cell and keep all of them in one file.

    The file is written after each cell, so that an end by a time limit leaves what was measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{benchmark}.json"
    found: dict[str, Any] = {
        "benchmark": benchmark,
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": None,
        "settings": settings,
        "variants": {},
        "cells": [],
        "failures": [],
    }
    for name in names:
        start = time.perf_counter()
        code = 0
        for message in _messages(benchmark, name, limit):
            if "exit" in message:
                code = message["exit"]
            elif "machine" in message:
                found["machine"] = message.pop("machine")
                found["variants"][name] = message
                print(f"{name}: started in {message['start_seconds']:.0f} s; {found['machine']}", flush=True)
            else:
                cell = {"variant": name, **message}
                found["cells"].append(cell)
                print(line(cell), flush=True)
            _write(file, found)
        seconds = time.perf_counter() - start
        if code:
            found["failures"].append({"variant": name, "exit": code, "seconds": seconds})
        print(f"{name}: ended with {code} after {seconds:.0f} s", flush=True)
    _write(file, found)
    print(f"{file}: {len(found['cells'])} cells, {len(found['failures'])} variants failed", flush=True)
    if found["failures"]:
        raise SystemExit(1)


def replies(limit: float) -> Callable[[dict[str, Any]], None]:
    """How a variant's process tells what it found. What else it prints goes to standard error from now on.

    After ``limit`` seconds it says where it stands and ends.
    """
    faulthandler.dump_traceback_later(limit, exit=True)
    stream: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=stream, flush=True)

    return reply


def _messages(benchmark: str, name: str, limit: float) -> Iterator[dict[str, Any]]:
    """What the process says, and last its exit status."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{benchmark}", *sys.argv[1:], "--variant", name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit + 20, child.kill)
    timer.start()
    try:
        assert child.stdout is not None
        for text in child.stdout:
            yield json.loads(text)
        yield {"exit": child.wait()}
    finally:
        timer.cancel()
        child.kill()
        child.wait()


def _write(file: Path, found: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)
