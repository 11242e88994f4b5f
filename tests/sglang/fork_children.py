"""SGLang's processes forked instead of spawned, where tests start many servers."""

from __future__ import annotations

import multiprocessing
from typing import Any


def fork_children() -> None:
    """To be called before SGLang asks for ``spawn``, for fear of what a forked process does to CUDA. Each that it
    spawns imports all of SGLang again, 13 seconds of a core."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = _ignore  # type: ignore[assignment]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
