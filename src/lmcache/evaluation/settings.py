"""What the rows of a run depend on."""

from __future__ import annotations

import platform
from importlib.metadata import entry_points, version
from pathlib import Path

import torch
from blake3 import blake3

import lmcache
from lmcache.bench.machine import processor
from lmcache.evaluation.earlier_prompt import Context
from lmcache.evaluation.rows import Settings

_SOURCES = (
    "blend/**/*.py",
    "integration/transformers/*.py",
    "evaluation/blended.py",
    "evaluation/measures.py",
    "evaluation/codec_trip.py",
    "storage/codecs/*.py",
)


def settings_of(
    model_name: str, weights: str, *, dtype: str, device: str, context: Context, answer_tokens: int
) -> Settings:
    """The settings of a run in this process; ``weights`` identifies the model."""
    return Settings(
        model=model_name,
        weights=weights,
        dtype=dtype,
        context=context,
        answer_tokens=answer_tokens,
        threads=torch.get_num_threads(),
        processor=torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("lmcache-blend", "torch", "transformers")},
            **_plugins(),
        },
        code=code_digest(),
    )


def _plugins() -> dict[str, str]:
    """Versions of the distributions that bring policies and correctors."""
    points = [*entry_points(group="lmcache.blend_policies"), *entry_points(group="lmcache.blend_correctors")]
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def code_digest() -> str:
    """Of the source that makes the rows: a released version says less than this while one works on a policy."""
    root = Path(lmcache.__file__).parent
    digest = blake3()
    for pattern in _SOURCES:
        for file in sorted(root.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest(8)
