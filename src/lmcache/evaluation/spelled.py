"""Policies and correctors as a user spells them: ``query_attention(layers=late,heads=max),sink(k=4)``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol, TypeVar

from lmcache.evaluation.errors import EvaluationError


class _Named(Protocol):
    name: ClassVar[str]


P = TypeVar("P", bound=_Named)

_OUTER_COMMA: Final = re.compile(r",(?![^(]*\))")
_ITEM: Final = re.compile(r"([^()]+?)\s*(?:\((.*)\))?")


def items(option: str, text: str) -> list[str]:
    """What stands between the commas of ``text`` that are outside of parentheses, each once."""
    found = [item.strip() for item in _OUTER_COMMA.split(text)]
    if not all(found):
        raise EvaluationError(f"{option} {text!r}: nothing stands before, between or behind its commas")
    return list(dict.fromkeys(found))


def make_all(option: str, text: str, make: Callable[..., P]) -> dict[str, P]:
    """A part for each item of ``text``, by its name with its options in parentheses as they were written.

    Args:
        option: of the command line, for errors.
        make: makes a part from its name and options; raises ValueError.

    Raises:
        EvaluationError: an item cannot be read, or made.
    """
    made: dict[str, P] = {}
    for item in items(option, text):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise EvaluationError(f"{option}: {item!r} must be NAME or NAME(OPTION=VALUE,…)")
        name, options = match[1], match[2]
        try:
            part = make(name, **_options(option, item, options or ""))
        except EvaluationError:
            raise
        except ValueError as error:
            raise EvaluationError(f"{option}: {error}") from None
        made[f"{part.name}({''.join(options.split())})" if options else part.name] = part
    return made


def _options(option: str, item: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # A comma inside of brackets belongs to a list of layers.
    for pair in re.split(r",(?![^\[]*\])", text) if text else []:
        name, equals, value = (word.strip() for word in pair.partition("="))
        if not (name.isidentifier() and equals and value):
            raise EvaluationError(f"{option}: {item!r}: {pair.strip()!r} must be OPTION=VALUE")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """A Python literal; what is none is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
