"""Parts that are chosen by name: ours, and those that other installed distributions bring."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast


class _Named(Protocol):
    name: ClassVar[str]


P = TypeVar("P", bound=_Named)


class PluginRegistry(Generic[P]):
    """Classes by name, ours first: an installed one cannot take the place of one of ours.

    Upper and lower case, "-" and "_" are the same in a name.

    Args:
        kind: what they are, in words.
        group: the entry-point group in which others announce theirs: a name and the class. They are imported when they
            are asked for by name, not before.
        base: what each of them derives from.
        builtin: ours.
    """

    def __init__(self, kind: str, group: str, base: type[Any], builtin: Iterable[type[P]]) -> None:
        self._kind = kind
        self._group = group
        self._base = base
        self.builtin = {part.name: part for part in builtin}

    def names(self) -> list[str]:
        """Ours in their order, then the installed ones in alphabetical order."""
        return [*self.builtin, *sorted(self._installed())]

    def make(self, name: str, /, **options: Any) -> P:
        """A new one.

        Raises:
            ValueError: the name or an option is unknown, an option's value is bad, or what another distribution
                installed under the name cannot be used.
        """
        part = self._find(name)
        try:
            return part(**options)
        except TypeError as error:
            known = ", ".join(inspect.signature(part).parameters) or "none"
            raise ValueError(f"{self._kind} {name!r} with {options}: {error}; its options: {known}") from error

    def _find(self, name: str) -> type[P]:
        key = canonical(name)
        if key in self.builtin:
            return self.builtin[key]
        installed = self._installed().get(key, [])
        if not installed:
            raise ValueError(f"unknown {self._kind} {name!r}: must be one of {', '.join(self.names())}")
        if len({point.value for point in installed}) > 1:
            where = " and ".join(sorted(point.value for point in installed))
            raise ValueError(f"{self._kind} {name!r} is installed twice, as {where}: uninstall one of them")
        return self._load(installed[0])

    def _load(self, point: EntryPoint) -> type[P]:
        try:
            part = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self._kind} {point.name!r}: {point.value} cannot be imported: {error}") from error
        if not (inspect.isclass(part) and issubclass(part, self._base)):
            raise ValueError(f"{self._kind} {point.name!r}: {point.value} is not a subclass of {self._base.__name__}")
        return cast(type[P], part)

    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self._group):
            if (key := canonical(point.name)) not in self.builtin:
                found.setdefault(key, []).append(point)
        return found


def canonical(name: str) -> str:
    """A name as it is compared."""
    return name.strip().lower().replace("-", "_")
