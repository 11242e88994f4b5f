from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.tensor_parallel.small_model import save


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("small-llama")
    save(folder)
    return str(folder)
