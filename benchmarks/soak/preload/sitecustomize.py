"""Runs in every process of a server under soak: tells, when the file ``SOAK_HELD`` is touched, what the cache holds."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def held() -> dict[str, Any] | None:
    """None in a process that has no cache. Beside what is held, the seconds of each hook's longest call so far."""
    module = sys.modules.get("lmcache.storage.cpu")
    if module is None:
        return None
    gc.unfreeze()  # engines hide what lives long
    tiers = [each for each in gc.get_objects() if type(each) is module.LocalCPUTier]
    if not tiers:
        return None
    pins = references = live = 0
    for tier in tiers:
        with tier._lock:
            entries = {id(obj) for obj in tier._entries.values()}
            pins += sum(tier._pins.values())
        for obj in tier.pool.live_objects():
            live += 1
            references += obj.ref_count - (id(obj) in entries)
    return {"pins": pins, "references": references, "live": live, "wall": time.time(), "longest hooks": _hooks()}


def _hooks() -> dict[str, float]:
    module = sys.modules.get("lmcache.observability.hook_times")
    longest: dict[str, float] = {}
    for times in [each for each in gc.get_objects() if module is not None and type(each) is module.HookTimes]:
        for hook, seconds in times.longest.items():
            longest[hook] = max(seconds, longest.get(hook, 0.0))
    return longest


def answer(asked: Path) -> None:
    last = 0
    while True:
        time.sleep(0.25)
        try:
            now = asked.stat().st_mtime_ns
        except OSError:
            continue
        if now != last and (found := held()) is not None:
            last = now
            target = asked.with_name(f"{asked.name}.{os.getpid()}")
            part = target.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.rename(target)


if "SOAK_HELD" in os.environ:
    threading.Thread(target=answer, args=(Path(os.environ["SOAK_HELD"]),), name="soak-held", daemon=True).start()
