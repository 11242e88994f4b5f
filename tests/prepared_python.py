"""Processes that begin with an engine imported: most of the seconds that an engine takes to start."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def prepared(imported: str, environment: Mapping[str, str]) -> Any:
    """A context of multiprocessing whose processes are forked by one without threads, which has the module ``imported``
    and in whose environment ``environment`` is. There is one in a test run: an engine has an environment of its own."""
    return _prepared(imported, tuple(environment.items()))


@cache
def _prepared(imported: str, environment: tuple[tuple[str, str], ...]) -> Any:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([imported])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_as_main(module: str, arguments: list[str], environment: Mapping[str, str], log: str) -> None:
    """In a process that was forked: ``python -m module …`` in a session of its own; what it prints goes behind what is
    in ``log``."""
    os.setsid()
    os.chdir(REPOSITORY)
    begin_anew(environment, log)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def begin_anew(environment: Mapping[str, str], log: str) -> None:
    """In a process that was forked: ``environment`` alone, nothing to read, and what it prints behind what is in
    ``log``."""
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
