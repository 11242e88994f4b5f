"""What SGLang's server was started with, as far as its calls to us do not say."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch


def _server_args() -> Any:
    """SGLang's ``ServerArgs``; None outside of a server."""
    module = sys.modules.get("sglang.srt.server_args")
    try:
        return None if module is None else module.get_global_server_args()
    except Exception:  # "not set yet", in other words in each version
        return None


def page_size() -> int:
    """Tokens in a page of SGLang's pool; 1 when nobody says."""
    return int(getattr(_server_args(), "page_size", None) or 1)


def speculative_algorithm() -> str | None:
    """The name of the speculative decoding that is on, if any."""
    name = getattr(_server_args(), "speculative_algorithm", None)
    return None if name is None else str(name)


def lora_enabled() -> bool:
    args = _server_args()
    return bool(getattr(args, "enable_lora", None) or getattr(args, "lora_paths", None))


def kv_dtype(stored: torch.dtype) -> torch.dtype:
    """Of the KV in pools of ``stored``: SGLang keeps both 8-bit floats as bytes."""
    name = str(getattr(_server_args(), "kv_cache_dtype", ""))
    if stored != torch.uint8:
        return stored
    return {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}.get(name, stored)


def chosen(fields: Iterable[str]) -> dict[str, str]:
    """Some of the server's arguments, as text."""
    args = _server_args()
    return {field: str(getattr(args, field, None)) for field in fields}
