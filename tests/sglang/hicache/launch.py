"""SGLang's ``launch_server`` with what its HiCache lacks on a CPU: ``python -m`` this."""

from __future__ import annotations

import runpy

from tests.sglang.hicache import cpu_transfers

cpu_transfers.install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
