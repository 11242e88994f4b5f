"""Which weights a model has, and with which settings it runs: what keeps the KV of two models apart.

Equal for every engine that serves the same files in the same way, so that engines share what they keep.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from lmcache.integration.config_digest import config_digest

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class ModelIdentity(NamedTuple):
    """Fields of :class:`lmcache.metadata.LMCacheEngineMetadata`."""

    model_name: str
    revision: str
    model_config: str


def model_identity(
    model: str,
    revision: str | None,
    hf_config: Any,
    *,
    overrides: dict[str, Any],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    quantization: str | None,
) -> ModelIdentity:
    """Args:
    model: a folder, or a name on a hub with its ``revision``.
    hf_config: the text model's Hugging Face config, as the engine loaded it.
    overrides: what the engine was told to change in it.
    """
    path = Path(model)
    settings = _settings(path, hf_config) | {
        "overrides": overrides,
        "model_dtype": str(dtype),
        "kv_dtype": str(kv_dtype),
        "quantization": quantization,
    }
    return ModelIdentity(
        model_name=path.name if path.exists() else model,
        revision=_revision(path, revision, hf_config),
        model_config=config_digest(settings),
    )


def fingerprint(path: Path) -> str:
    """Digest of the weights in a local folder (or one file): names, sizes and 16 evenly spaced samples of each file.

    Reading all of a 100 GB model at start is no option; some sample changing with retrained weights is certain enough,
    and unlike the modification time it is the same on every host.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    stats = [file.stat() for file in files]
    return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@lru_cache(maxsize=1024)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = blake3()
    for file, size, _ in files:
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest(16)


def _settings(path: Path, hf_config: Any) -> dict[str, Any]:
    """The file where there is one: engines and versions of transformers fill in defaults each in its own way."""
    file = path / "config.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else hf_config.to_dict()
    return settings


def _revision(path: Path, revision: str | None, hf_config: Any) -> str:
    if path.exists():
        return fingerprint(path)
    return str(getattr(hf_config, "_commit_hash", None) or revision or "")
