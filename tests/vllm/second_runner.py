"""vLLM as it is on a GPU, on a CPU: its second model runner, and a scheduler that is a step ahead.

    python -m tests.vllm.second_runner MODULE [ARGUMENT …]

runs a scenario so. vLLM chooses its first runner where Triton is missing, and never schedules ahead on a CPU; here
Triton's interpreter runs the runner's kernels. The Triton is that of the environment for SGLang (``SGLANG_PYTHON``):
vLLM's for CPUs comes without.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace


def find_triton() -> Path | None:
    """Its package, wherever it is installed."""
    if (here := find_spec("triton")) is not None and here.origin is not None:
        return Path(here.origin).parent
    environment = Path(os.environ.get("SGLANG_PYTHON", sys.executable)).parent.parent
    return next(environment.glob("lib/python3*/site-packages/triton"), None)


def use_second_runner() -> None:
    """From now on, in this process; before vLLM is imported."""
    assert "vllm" not in sys.modules
    os.environ.update({"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"})
    _import_triton()
    from triton.backends import backends

    # vLLM wants a driver to be there. The interpreter asks none.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    from vllm.platforms.cpu import CpuPlatform

    as_on_a_cpu = CpuPlatform.check_and_update_config.__func__

    def ahead(cls: type, vllm_config: object) -> None:
        as_on_a_cpu(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(ahead)


def _import_triton() -> None:
    package = find_triton()
    assert package is not None, "there is no Triton: make setup-sglang"
    spec = spec_from_file_location("triton", package / "__init__.py", submodule_search_locations=[str(package)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["triton"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["triton"])


def main() -> None:
    module, *arguments = sys.argv[1:]
    use_second_runner()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
