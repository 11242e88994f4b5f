"""``lmcache config``: every value in effect, and where it came from."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache.cli.refusing import refuse


def config(
    file: Annotated[
        Path | None, typer.Option("--file", help="A YAML file, instead of the one that LMCACHE_CONFIG_FILE names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every configuration value in effect, where it came from, and what it means.

    Sources, later ones win: defaults, the YAML file, LMCACHE_<KEY> environment variables. (An engine's
    kv_connector_extra_config, which wins over all, is known only to the engine.) A wrong value: exit code 2.
    """
    from lmcache.config import LMCacheEngineConfig
    from lmcache.config.sources import CONFIG_FILE_VARIABLE

    environ = dict(os.environ)
    if file is not None:
        environ[CONFIG_FILE_VARIABLE] = str(file)
    try:
        effective = LMCacheEngineConfig.load(environ=environ)
    except ValueError as error:
        refuse(error)
    options = {
        key: {
            "value": _without_password(value) if key == "remote_url" else value,
            "source": effective.source_of(key),
            "description": LMCacheEngineConfig.model_fields[key].description,
        }
        for key, value in effective.model_dump(mode="json").items()
    }
    if as_json:
        typer.echo(json.dumps(options, indent=2, ensure_ascii=False))
    else:
        _print_table(options)


def _without_password(url: str | None) -> str | None:
    return url and re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", url)


def _print_table(options: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "value", "from", "what it is", box=None, header_style="bold", pad_edge=False)
    for key, option in options.items():
        changed = "bold" if option["source"] != "default" else "dim"
        table.add_row(
            key,
            Text(json.dumps(option["value"], ensure_ascii=False), style="bold"),
            Text(option["source"], style=changed),
            option["description"],
        )
    # In a pipe there is no width to fit into, and folded lines would be hard to search.
    Console(width=None if sys.stdout.isatty() else 250).print(table)
