"""A digest of a model's settings, the same wherever its files lie."""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

# The names of files and of the library that wrote them say nothing about KV.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})


def config_digest(settings: dict[str, Any]) -> str:
    """32 hex digits. ``settings`` is a Hugging Face config as a dictionary, with whatever else changes KV."""
    plain = json.dumps({k: v for k, v in settings.items() if k not in _VOLATILE}, sort_keys=True, default=str)
    return blake3(plain.encode()).hexdigest(16)
