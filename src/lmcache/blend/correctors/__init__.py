"""Correctors, by name.

Another distribution adds its own through the entry-point group ``lmcache.blend_correctors``::

    [project.entry-points."lmcache.blend_correctors"]
    my_corrector = "my_package:MyCorrector"
"""

from __future__ import annotations

from typing import Any

from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.correctors.key_shift import KeyShiftCorrector
from lmcache.blend.correctors.kriging import KrigingCorrector
from lmcache.blend.correctors.local_key_shift import LocalKeyShiftCorrector
from lmcache.blend.correctors.none import NoneCorrector
from lmcache.blend.plugins import PluginRegistry

CORRECTORS: PluginRegistry[Corrector] = PluginRegistry(
    "corrector",
    "lmcache.blend_correctors",
    Corrector,
    (NoneCorrector, KeyShiftCorrector, LocalKeyShiftCorrector, KrigingCorrector),
)


def make_corrector(name: str, /, **options: Any) -> Corrector:
    """A corrector by its name; ``options`` are its constructor's.

    Raises:
        ValueError: the name or an option is unknown, an option's value is bad, or what another distribution installed
            under the name cannot be used.
    """
    return CORRECTORS.make(name, **options)


def corrector_names() -> list[str]:
    """Every name that :func:`make_corrector` takes: ours, then those that other distributions installed."""
    return CORRECTORS.names()
