"""The ``lmcache`` command.

A subcommand is one file beside this one: ``config_command.py`` holds a function ``config``. What is heavy (torch, an
engine) is imported inside the function, so that ``lmcache --help`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import typer

import lmcache.cli

_SUFFIX = "_command"


def _build() -> typer.Typer:
    # Without the callback, typer would run an only subcommand as the command itself.
    app = typer.Typer(
        name="lmcache",
        help="A KV-cache layer for LLM serving.",
        callback=lambda: None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for module in iter_modules(lmcache.cli.__path__):
        if module.name.endswith(_SUFFIX):
            name = module.name.removesuffix(_SUFFIX)
            app.command(name)(getattr(import_module(f"lmcache.cli.{module.name}"), name))
    return app


app = _build()
