"""What a process pays before its first request: importing us, and starting with a pool of 4 GiB configured."""

from __future__ import annotations

from importlib import import_module

from lmcache.bench.fresh_process import Figures, in_fresh_process, resident_bytes
from lmcache.bench.rows import Row
from lmcache.bench.settings import Settings
from lmcache.bench.timing import median, seconds

POOL_GIB = 4
MAX_IMPORT_SECONDS = 0.3
MAX_START_SECONDS = 1.0
MAX_START_MB = 100.0


def measure_startup(settings: Settings) -> list[Row]:
    measured = [in_fresh_process(start) for _ in range(-(-settings.runs // 2))]  # a process takes seconds

    def row(figure: str, case: str, unit: str, name: str, max_value: float) -> Row:
        value = median([figures[name] for figures in measured])
        return Row("startup", figure, case, unit, value, max_value=max_value)

    pool = f"{POOL_GIB} GiB pool configured"
    return [
        row("import", "all of the cache, beyond torch", "s", "import seconds", MAX_IMPORT_SECONDS),
        row("start", pool, "s", "start seconds", MAX_START_SECONDS),
        row("resident memory after it", pool, "MB", "megabytes", MAX_START_MB),
    ]


def start() -> Figures:
    """In a process of its own: this module and those that it imports need nothing of ours that is heavy."""
    import_module("torch")
    import_seconds = seconds(lambda: import_module("lmcache.manager"))
    from lmcache.config import LMCacheEngineConfig
    from lmcache.manager import LMCacheManager
    from lmcache.metadata import LMCacheEngineMetadata

    managers: list[LMCacheManager] = []
    before = resident_bytes()
    start_seconds = seconds(
        lambda: managers.append(
            LMCacheManager(
                LMCacheEngineConfig.from_defaults(max_local_cpu_size=POOL_GIB),
                LMCacheEngineMetadata(model_name="bench"),
            )
        )
    )
    grown = resident_bytes() - before
    managers.pop().close()
    return {"import seconds": import_seconds, "start seconds": start_seconds, "megabytes": grown / 1e6}
