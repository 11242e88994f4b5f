"""Where values come from: a YAML file, the environment, the engine, the caller."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lmcache.observability.logging import LOG_LEVEL_VARIABLE, init_logger

logger = init_logger(__name__)

ENVIRONMENT_PREFIX = "LMCACHE_"
CONFIG_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
ENGINE_PREFIX = "lmcache."
SERVER_ADDRESS_PREFIX = "lmcache.mp."
"""Of entries that say where ``LMCacheMPConnector`` finds its server; they are read there."""
ENGINE_CONFIG = "kv_connector_extra_config"
# Read elsewhere: these say where the configuration is, and how to log while it is read.
_OTHER_VARIABLES = (CONFIG_FILE_VARIABLE, LOG_LEVEL_VARIABLE)


@dataclass(frozen=True)
class Value:
    """As it was written, and where, in words."""

    raw: Any
    source: str


Values: TypeAlias = dict[str, Value]


def from_yaml(path: Path, keys: Collection[str]) -> Values:
    """Values of a YAML file.

    Raises:
        ValueError: it cannot be read, is not YAML, or is not a mapping.
    """
    source = f"YAML file {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    if content is None:  # an empty file
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{source} must hold lines of 'key: value', not a {type(content).__name__}")
    entries = {str(name): Value(raw, source) for name, raw in content.items()}
    return _known(entries, {key: key for key in keys}, source)


def from_environment(environ: Mapping[str, str], keys: Collection[str]) -> Values:
    """Values of the variables ``LMCACHE_<KEY>``. An empty one counts as not set."""
    entries = {
        name: Value(raw, f"environment variable {name}")
        for name, raw in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _OTHER_VARIABLES and raw
    }
    return _known(entries, {f"{ENVIRONMENT_PREFIX}{key.upper()}": key for key in keys}, "environment variable")


def from_engine(extra_config: Mapping[str, Any], keys: Collection[str]) -> Values:
    """Values of the entries ``lmcache.<key>``. The others are the engine's own."""
    spelled = {f"{ENGINE_PREFIX}{key}": key for key in keys}
    for name, key in spelled.items():
        if key in extra_config and name not in extra_config:
            logger.warning("%s: %s does not reach LMCache without its prefix; write %s", ENGINE_CONFIG, key, name)
    entries = {
        name: Value(raw, f"{ENGINE_CONFIG} entry {name}")
        for name, raw in extra_config.items()
        if name.startswith(ENGINE_PREFIX) and not name.startswith(SERVER_ADDRESS_PREFIX)
    }
    return _known(entries, spelled, ENGINE_CONFIG)


def from_arguments(arguments: Mapping[str, Any], keys: Collection[str]) -> Values:
    """Values that a caller passed in code."""
    entries = {key: Value(raw, f"argument {key}") for key, raw in arguments.items()}
    return _known(entries, {key: key for key in keys}, "argument")


def _known(entries: Mapping[str, Value], spelled: Mapping[str, str], where: str) -> Values:
    """Values by key. ``spelled`` gives the key behind each name as this source writes it; any other name is warned
    about, with the nearest that is known."""
    values = {}
    for name, value in entries.items():
        if name in spelled:
            values[spelled[name]] = value
            continue
        near = difflib.get_close_matches(name, spelled, n=1)
        hint = f"did you mean {near[0]}?" if near else "`lmcache config` lists the known ones"
        logger.warning("%s: %s is unknown and ignored; %s", where, name, hint)
    return values
