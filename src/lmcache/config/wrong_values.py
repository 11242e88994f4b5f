"""A wrong configuration, told so that it can be mended: key, value, source, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lmcache.config.sources import Value


@dataclass(frozen=True)
class Contradiction:
    """Values that are fine each, but not together."""

    keys: tuple[str, ...]
    rule: str


class ContradictionError(ValueError):
    """Every :class:`Contradiction` of a configuration."""

    def __init__(self, contradictions: Sequence[Contradiction]) -> None:
        super().__init__("; ".join(f"{' and '.join(c.keys)}: {c.rule}" for c in contradictions))
        self.contradictions = contradictions


_SECRETS = ("disk_encryption_keys", "remote_encryption_keys")


def explain(error: ValidationError, values: Mapping[str, Value], schema: Mapping[str, Any]) -> str:
    """Every problem of ``error``, one a line.

    ``values`` are those that were given, by key; ``schema`` is the JSON schema of the configuration.
    """
    problems: dict[str, str] = {}
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionError):
            for contradiction in cause.contradictions:
                told = (_told(key, values.get(key) or _default(key, schema)) for key in contradiction.keys)
                problems[" and ".join(contradiction.keys)] = f"{' and '.join(told)}: {contradiction.rule}"
            continue
        key = str(detail["loc"][0])
        reason = f" ({cause})" if cause is not None else ""
        # A list with several wrong numbers is one problem: it is told as a whole.
        problems[key] = f"{_told(key, values[key])}: must be {allowed(schema['properties'][key])}{reason}"
    if len(problems) == 1:
        return f"wrong configuration: {next(iter(problems.values()))}"
    return "wrong configuration:\n" + "\n".join(f"  {problem}" for problem in problems.values())


def allowed(schema: Mapping[str, Any]) -> str:
    """What the JSON schema of one value takes, in words such as "a whole number, 1 … 65536"."""
    if "anyOf" in schema:
        return " or ".join(allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true, yes, on or 1; false, no, off or 0",
        "array": "a list",
        "object": "a JSON object",
        "null": "none",
        "string": "a directory" if schema.get("format") == "path" else "text",
    }[schema["type"]]
    if schema.get("minLength") or schema.get("minItems"):
        words += ", not empty"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        words += f", {low} … {high}"
    elif low is not None:
        words += f", {low} or more"
    elif "exclusiveMinimum" in schema:
        words += f", more than {schema['exclusiveMinimum']}"
    if "items" in schema:
        words += f", of {allowed(schema['items'])} each"
    return words


def _told(key: str, value: Value) -> str:
    shown = "(not shown)" if key in _SECRETS else repr(value.raw)
    return f"{key}={shown} ({value.source})"


def _default(key: str, schema: Mapping[str, Any]) -> Value:
    return Value(schema["properties"][key].get("default"), "default")
