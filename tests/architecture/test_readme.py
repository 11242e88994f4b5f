"""The README's table of configuration keys says what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lmcache.config import LMCacheEngineConfig

README = Path(__file__).parents[2] / "README.md"


def test_every_key_stands_in_the_readme_as_it_is() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| `(.*)` \| (.*) \|$", README.read_text(), re.MULTILINE)
    defaults = LMCacheEngineConfig.from_defaults().model_dump(mode="json")
    expected = [
        (key, json.dumps(defaults[key]), field.description) for key, field in LMCacheEngineConfig.model_fields.items()
    ]
    assert rows == expected
