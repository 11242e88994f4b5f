from __future__ import annotations

from typing import Any

import pytest

from tests.segmentation.tokenizers import LOOK_ALIKES, REAL, load


@pytest.fixture(scope="module", params=[*LOOK_ALIKES, *REAL])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """One of every kind; see :mod:`tests.segmentation.tokenizers` for which are real."""
    return load(request.param)
