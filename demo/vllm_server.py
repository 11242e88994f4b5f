"""The real vLLM, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from demo.server import EngineServer

ENVIRONMENT = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMServer(EngineServer):
    """``arguments`` go to vLLM's command line."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str | None], log: Path) -> None:
        super().__init__("vllm.entrypoints.openai.api_server", arguments, {**ENVIRONMENT, **environment}, log)
