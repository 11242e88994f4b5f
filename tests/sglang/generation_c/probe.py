"""Looks into the connector that runs inside SGLang's scheduler, and makes our code fail on demand.

Both through files in a folder: SGLang's processes share nothing else with the tests.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from pathlib import Path
from typing import Any

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.sglang.generation_c.operations import Lookup
from lmcache.integration.sglang.unified_lmcache_mp_connector import UnifiedLMCacheMPConnector
from lmcache.lease import PrefixLease
from lmcache.paging.token_connector import TokenConnector
from tests.leaks import LeakDetector

FAULTS: dict[str, tuple[type[Any], str]] = {
    f"{owner.__name__}.{name}": (owner, name)
    for owner, names in {
        LMCacheEngine: ("prefetch", "retrieve", "prefix_keys", "store"),
        PrefixLease: ("ready", "cut", "arrived"),
        TokenConnector: ("batched_from_gpu", "batched_to_gpu"),
        Lookup: ("release",),
    }.items()
    for name in names
}
"""What can be made to fail, by name: all that the connector calls."""


class InjectedError(RuntimeError):
    pass


def install(folder: Path) -> None:
    """To be called before SGLang builds its connector."""
    detector = LeakDetector()
    detector.install()
    asked = _Fault(folder / "fault")
    for fault, (owner, name) in FAULTS.items():
        setattr(owner, name, _breakable(asked, fault, getattr(owner, name)))
    init = UnifiedLMCacheMPConnector.__init__

    @functools.wraps(init)
    def probed(self: Any, *args: Any, tp_rank: int, **kwargs: Any) -> None:
        init(self, *args, tp_rank=tp_rank, **kwargs)
        asked.rank = tp_rank
        arguments = (folder, tp_rank, self, detector)
        threading.Thread(target=_answer, args=arguments, name="probe", daemon=True).start()

    UnifiedLMCacheMPConnector.__init__ = probed  # type: ignore[method-assign]


class _Fault:
    """The file says which: a name, or ``name@rank`` for one rank alone."""

    rank = 0

    def __init__(self, file: Path) -> None:
        self._file = file

    def strikes(self, fault: str) -> bool:
        return self._file.exists() and self._file.read_text() in (fault, f"{fault}@{self.rank}")


def _breakable(asked: _Fault, fault: str, method: Any) -> Any:
    after = fault == "Lookup.release"  # what is not given back because of the test is no leak of ours

    @functools.wraps(method)
    def broken(*args: Any, **kwargs: Any) -> Any:
        strikes = asked.strikes(fault)
        if strikes and not after:
            raise InjectedError(fault)
        result = method(*args, **kwargs)
        if strikes:
            raise InjectedError(fault)
        return result

    return broken


def _answer(folder: Path, rank: int, connector: UnifiedLMCacheMPConnector, detector: LeakDetector) -> None:
    """Write ``state-<rank>`` whenever ``ask-<rank>`` comes up."""
    question, answer, scratch = folder / f"ask-{rank}", folder / f"state-{rank}", folder / f"scratch-{rank}"
    while True:
        if question.exists():
            question.unlink()
            state = {
                "open": connector.open_requests,
                "leaks": detector.leaks(),
                "metrics": connector.metrics.snapshot(),
            }
            scratch.write_text(json.dumps(state))
            scratch.rename(answer)
        time.sleep(0.05)
