"""Refusing what cannot be done, in one line and with exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer


def refuse(why: object) -> NoReturn:
    """End the command; ``why`` says what is wrong and what to do."""
    typer.echo(str(why), err=True)
    raise typer.Exit(2)
