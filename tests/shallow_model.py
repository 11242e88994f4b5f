"""The real model cut short, for tests of many requests: what they are about is in what order things happen."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

LAYERS = 6
_PREFIX = "model.layers."


def shallow_model(model: Path, folder: Path, layers: int = LAYERS) -> Path:
    """Write ``model`` with its first ``layers`` layers alone to ``folder``: a fifth of the arithmetic of SmolLM2-135M.

    Its texts make no sense, but depend on all KV: the tests that use it hold them against those of wrong KV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if _layer(name) < layers},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@cache
def shallow_copy(model: Path) -> Path:
    """:func:`shallow_model` of ``model``, for as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="shallow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return shallow_model(model, folder)


def _layer(name: str) -> int:
    """−1: of no layer."""
    return int(name.removeprefix(_PREFIX).partition(".")[0]) if name.startswith(_PREFIX) else -1
