"""Whose KV it is."""

from __future__ import annotations

import msgspec

_MARK = "\0sglang:"


def tenant_salt(cache_salt: str | None, extra_key: str | None) -> str:
    """What sets a request apart: its ``cache_salt`` as it is, so that engines share what tenants have stored, and with
    it SGLang's ``extra_key`` (an adapter, say), if there is one. No two pairs give the same."""
    salt = cache_salt or ""
    if not extra_key and not salt.startswith(_MARK):
        return salt
    return _MARK + msgspec.json.encode([salt, extra_key or ""]).decode()
