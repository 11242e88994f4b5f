"""How a connector gets hold of the model that vLLM has loaded; vLLM does not hand it over.

vLLM hands over attention layers. From the plug-in on, PyTorch tells us which module was put into which, so that from a
layer the way goes up to the model, whatever loader and model class made it. Without the plug-in, the model runner that
is calling the connector is asked.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lmcache.observability.logging import init_logger

logger = init_logger(__name__)

_parents: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
_watching = False


def watch_modules() -> None:
    """From now on, remember which module of this process is part of which. Idempotent; keeps no module alive."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_remember)
        _watching = True
        logger.debug("Watching for the model that vLLM loads")


def find_model(layer: nn.Module) -> nn.Module | None:
    """The model that ``layer`` is a layer of.

    Without :func:`watch_modules` it is found only from within ``register_kv_caches``, which a model runner calls.
    """
    for model in (_root(layer), _model_of_caller()):
        # A model for text makes logits; a part of one whose way up was not seen to its end does not.
        if model is not None and hasattr(model, "compute_logits") and any(part is layer for part in model.modules()):
            return model
    return None


def _remember(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    try:
        if child is not None:
            _parents[child] = ref(parent)
    except TypeError:
        pass  # a module that cannot be hashed; it must be built all the same


def _root(module: nn.Module) -> nn.Module:
    while (parent := _parents.get(module)) is not None and (above := parent()) is not None:
        module = above
    return module


def _model_of_caller() -> nn.Module | None:
    """What the nearest model runner among the callers calls its model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if type(caller).__name__.endswith("ModelRunner") and hasattr(caller, "get_model"):
            model = caller.get_model()
            return model if isinstance(model, nn.Module) else None
        frame = frame.f_back
    return None
