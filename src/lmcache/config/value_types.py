"""Types of values, lenient in how they are spelled: YAML, environment variables and JSON write them differently."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, SecretStr

_UNSET = ("", "none", "null")


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # Python, and so pydantic, counts with booleans
        raise ValueError("a truth value is not a number")
    return value


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _sequence(value: Any) -> Any:
    """A lone number and the strings ``"1"``, ``"1, 2"`` and ``"[1, 2]"`` as lists."""
    if isinstance(value, str):
        text = value.strip()
        return _json(text) if text.startswith("[") else text.split(",")
    return (value,) if isinstance(value, int | float) else value


def _sequence_or_unset(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in _UNSET else _sequence(value)


def _mapping(value: Any) -> Any:
    return _json(value) if isinstance(value, str) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _directory(value: Any) -> Any:
    """A path or a ``file://`` URL, made absolute: what it means must not change with the working directory."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in _UNSET:
        return None
    scheme, is_url, rest = text.partition("://")
    if is_url:
        host, _, path = rest.partition("/")
        if scheme.lower() != "file" or host not in ("", "localhost"):
            raise ValueError("the only URLs taken are local, with three slashes: file:///var/cache/lmcache")
        text = unquote(f"/{path}")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _url(value: Any) -> Any:
    """With the scheme in lower case; whether there is such a store is said when it is opened."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in _UNSET:
        return None
    scheme, is_url, rest = text.partition("://")
    if not is_url or not scheme:
        raise ValueError("must be a URL such as redis://host:6379 or file:///mnt/shared/kv")
    return f"{scheme.lower()}://{rest}"


def _number_or_unset(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in _UNSET else _number(value)


def _none_if_unset(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in _UNSET else value


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.strip().upper().replace("-", "") if isinstance(value, str) else value


Int: TypeAlias = Annotated[int, BeforeValidator(_number)]
Float: TypeAlias = Annotated[float, BeforeValidator(_number)]
Bool: TypeAlias = Annotated[bool, BeforeValidator(_stripped)]
Layers: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=0), BeforeValidator(_number)], ...], BeforeValidator(_sequence)
]
Ratios: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)], ...], BeforeValidator(_sequence)
]
Thresholds: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=0), BeforeValidator(_number)], ...], Field(min_length=1)
]
OptionalThresholds: TypeAlias = Annotated[Thresholds | None, BeforeValidator(_sequence_or_unset)]
JsonObject: TypeAlias = Annotated[Mapping[str, Any], BeforeValidator(_mapping)]
OptionalDirectory: TypeAlias = Annotated[Path | None, BeforeValidator(_directory)]
OptionalUrl: TypeAlias = Annotated[str | None, BeforeValidator(_url)]
OptionalFloat: TypeAlias = Annotated[float | None, BeforeValidator(_number_or_unset)]
OptionalSecret: TypeAlias = Annotated[SecretStr | None, BeforeValidator(_none_if_unset)]
CodecName: TypeAlias = Annotated[Literal["raw", "zstd", "fp8", "delta"], BeforeValidator(_lower)]
PolicyName: TypeAlias = Annotated[Literal["LRU", "LFU", "FIFO", "S3FIFO"], BeforeValidator(_upper)]
ChunkLayout: TypeAlias = Annotated[Literal["automatic", "token_major"], BeforeValidator(_lower)]
BlendSegmentation: TypeAlias = Annotated[Literal["automatic", "separator", "explicit"], BeforeValidator(_lower)]
