"""Whose KV it is, and whether it is exact."""

from __future__ import annotations

import json
from itertools import count
from typing import NamedTuple

_MARK = "\0sglang:"
_BLENDED = "\0blended:"
_numbers = count()


class Tenant(NamedTuple):
    """``salt`` sets a tenant's KV apart; what is not ``exact`` was computed on blended KV."""

    salt: str
    exact: bool


def blended_key(extra_key: str | None, request_id: str) -> str:
    """SGLang's ``extra_key`` for a request that is blended: its KV meets no other request's in the radix tree."""
    return f"{extra_key or ''}{_BLENDED}{next(_numbers)}:{request_id}"


def joined(cache_salt: str | None, extra_key: str | None) -> str:
    """One string for both, to be read by :func:`tenant_of`.

    The ``cache_salt`` alone stays as it is, so that engines share what a tenant has stored. No two pairs give the same.
    """
    own, blended, _ = (extra_key or "").partition(_BLENDED)
    salt = cache_salt or ""
    if own or salt.startswith("\0"):
        salt = _MARK + json.dumps([salt, own])  # takes half a surrogate pair, which a client may send
    return _BLENDED + salt if blended else salt


def tenant_of(salt: str) -> Tenant:
    """The reverse of :func:`joined`, as far as the cache cares."""
    return Tenant(salt.removeprefix(_BLENDED), not salt.startswith(_BLENDED))
