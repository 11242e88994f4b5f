"""Looks into the connector of generation A or B and the radix tree around it, through files in a folder."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lmcache.integration.sglang.attached_cache import AttachedCache
from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from tests.leaks import LeakDetector

HELD_SECONDS = 1.0
"""How long a look-up is held for a request that SGLang never mentions again; a minute where nobody tests."""


def install(folder: Path) -> None:
    """To be called before SGLang builds its radix tree."""
    detector = LeakDetector()
    detector.install()
    init = AttachedCache.__init__

    @functools.wraps(init)
    def probed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        arguments = (folder, self, _caller("LMCRadixCache"), detector)
        threading.Thread(target=_answer, args=arguments, name="probe", daemon=True).start()

    AttachedCache.__init__ = probed  # type: ignore[method-assign]
    mp_init = LMCacheMPConnector.__init__
    LMCacheMPConnector.__init__ = functools.partialmethod(  # type: ignore[method-assign, assignment]
        mp_init, lookup_seconds=HELD_SECONDS
    )


def _caller(kind: str) -> Any:
    """The object of the class named ``kind`` whose constructor is under way."""
    frame = sys._getframe()
    while type(frame.f_locals.get("self")).__name__ != kind:
        assert frame.f_back is not None, f"no {kind} builds this"
        frame = frame.f_back
    return frame.f_locals["self"]


def _answer(folder: Path, connector: Any, radix: Any, detector: LeakDetector) -> None:
    """Write ``state-0`` whenever ``ask-0`` comes up. SGLang has nothing to do then, so its numbers stand still."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    question, answer, scratch = folder / "ask-0", folder / "state-0", folder / "scratch-0"
    while True:
        if question.exists():
            question.unlink()
            # A layerwise store stays locked until SGLang next wants room; this asks for none.
            radix.evict(EvictParams(num_tokens=0))
            allocator = radix.token_to_kv_pool_allocator
            state = {
                "leases": len(getattr(connector, "_leases", ())),
                "leaks": detector.leaks(),
                "metrics": connector.metrics.snapshot(),
                "locked": int(radix.protected_size()),
                "lost_slots": int(allocator.size - allocator.available_size() - radix.total_size()),
            }
            scratch.write_text(json.dumps(state))
            scratch.rename(answer)
        time.sleep(0.05)
