"""SGLang's ``launch_server`` with :mod:`probe` in it: ``python -m`` this. The variable PROBE_FOLDER names the folder.

Nothing of SGLang is changed.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from tests.sglang.generation_c import probe

probe.install(Path(os.environ["PROBE_FOLDER"]))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
