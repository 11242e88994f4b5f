"""Reading the file of ``--lmcache-config-file`` as SGLang 0.5.13 to 0.5.20 ask for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

_config_files: list[str] = []


@dataclass(frozen=True)
class DaemonAddress:
    """Where the file says that a daemon listens. There is none: SGLang merely insists on passing an address along."""

    mp_host: str = "localhost"
    mp_port: int = 5555


def lmcache_get_config(config_file: str | os.PathLike[str] | None = None) -> DaemonAddress:
    """Remember ``config_file`` for the connector that SGLang builds next, without passing the file along.

    Raises:
        ValueError: the file cannot be read, or is not YAML of the form ``key: value``.
    """
    if not config_file:
        return DaemonAddress()
    path = Path(config_file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--lmcache-config-file {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--lmcache-config-file {path} must hold lines of 'key: value'")
    _config_files[:] = [str(path)]
    known = {key: content[key] for key in ("mp_host", "mp_port") if key in content}
    return DaemonAddress(**known)


def last_config_file() -> str | None:
    """The file that :func:`lmcache_get_config` read last."""
    return _config_files[-1] if _config_files else None
