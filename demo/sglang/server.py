"""The real, unmodified SGLang, on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from demo.server import EngineServer

SHIMS = Path(__file__).with_name("shims")
# The flags and what is in SHIMS are all that it takes to run on a CPU without Intel's AMX.
ARGUMENTS = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--disable-overlap-schedule", "--skip-server-warmup"),
]
# Otherwise a scheduler without requests asks for some without a pause, which takes a whole core.
SLEEP_ON_IDLE = "--sleep-on-idle"


class SGLangServer(EngineServer):
    """``arguments`` go to SGLang's command line; ``lmcache=False`` starts it without us, to compare.

    ``environment``: a PYTHONPATH in it comes behind the shims and before that of this process.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str | None],
        log: Path,
        *,
        lmcache: bool = True,
    ) -> None:
        paths = [str(SHIMS), environment.get("PYTHONPATH") or "", os.environ.get("PYTHONPATH", "")]
        ours = ["--enable-lmcache"] if lmcache else []
        super().__init__(
            "sglang.launch_server",
            ["--model-path", str(model), *ARGUMENTS, SLEEP_ON_IDLE, *ours, *arguments],
            {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            log,
        )

    def flush(self, timeout: float = 30) -> None:
        """Empty SGLang's own cache, once it has nothing left to do. What we keep stays.

        Raises:
            TimeoutError: it was still busy after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:  # SGLang refuses while a store of ours is under way
            response = httpx.post(f"{self.url}/flush_cache", timeout=timeout)
            if response.is_success:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"SGLang did not flush its cache in {timeout:.0f} s: {response.text.strip()}")
            time.sleep(0.1)
