"""``launch_server`` of an older SGLang with :mod:`probe` in it, and with what it lacks on a CPU: ``python -m`` this.

Nothing of SGLang is changed, but its processes are forked. OLD_SGLANG is its version, PROBE_FOLDER the folder of the
probe.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from tests.sglang.engine_ab import absent_kernels, cpu_streams, probe
from tests.sglang.fork_children import fork_children

first_generation = os.environ["OLD_SGLANG"] == "0.5.12"
cpu_streams.install(as_cuda=first_generation)
if first_generation:
    absent_kernels.install()
probe.install(Path(os.environ["PROBE_FOLDER"]))

if __name__ == "__main__":
    fork_children()
    runpy.run_module("sglang.launch_server", run_name="__main__")
