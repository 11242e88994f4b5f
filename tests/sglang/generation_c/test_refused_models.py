"""Models that SGLang serves and we do not: they are refused at start, in words that say why and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.server import ServerFailedError
from tests.sglang.generation_c.probed_server import probed_server
from tests.sglang.generation_c.tiny_other_models import OTHER_MODELS, write_other_model

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_that_keeps_more_than_kv(tmp_path: Path, kind: str) -> None:
    model = write_other_model(tmp_path / "model", kind)
    with (
        pytest.raises(ServerFailedError),
        probed_server(tmp_path, model=model, arguments=["--load-format", "dummy"]),
    ):
        pass
    log = (tmp_path / "sglang.log").read_text()
    assert "UnsupportedSetupError: --enable-lmcache: this model's cache also has" in log
    assert "Start SGLang without --enable-lmcache" in log
