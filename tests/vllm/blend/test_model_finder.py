from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import pytest
from torch import nn

from lmcache.integration.vllm import plugin
from lmcache.integration.vllm.blend.model_finder import find_model


class Decoder(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(depth))


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def compute_logits(self) -> None: ...


class SomeModelRunner:
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get_model(self) -> nn.Module:
        return self._model

    def call_connector(self, layer: nn.Module) -> nn.Module | None:
        return find_model(layer)


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()


def test_from_a_layer_up_to_its_model() -> None:
    model, other = TextModel(), TextModel()
    assert find_model(model.model.layers[1][0]) is model
    assert find_model(other.model.layers[0][0]) is other, "a draft model, say"


def test_a_layer_that_is_replaced_later() -> None:
    model = TextModel()
    model.model.layers[0] = nn.Sequential(nn.Identity())
    assert find_model(model.model.layers[0][0]) is model


def test_what_makes_no_logits_is_no_model() -> None:
    assert find_model(Decoder().layers[0]) is None
    assert find_model(nn.Identity()) is None


def test_no_model_is_kept_alive() -> None:
    model = TextModel()
    gone, layer = weakref.ref(model), model.model.layers[0][0]
    del model
    gc.collect()
    assert gone() is None
    assert find_model(layer) is None


def test_a_layer_that_the_plug_in_has_not_seen_is_looked_for_in_the_calling_runner() -> None:
    model, unseen = TextModel(), nn.Identity()
    model.model.layers[0]._modules["0"] = unseen
    assert find_model(unseen) is None, "nobody is calling"
    assert SomeModelRunner(model).call_connector(unseen) is model
    assert SomeModelRunner(TextModel()).call_connector(unseen) is None, "it is of another model"


def test_registering_twice_watches_once() -> None:
    with patch("lmcache.integration.vllm.blend.model_finder.register_module_module_registration_hook") as register:
        plugin.register()
    register.assert_not_called()


def test_registering_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    with patch("lmcache.integration.vllm.blend.model_finder.watch_modules", side_effect=OSError("injected")):
        plugin.register()
    assert "injected" in caplog.text


def test_modules_that_cannot_be_hashed_can_be_built() -> None:
    class Odd(nn.Module):
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError):
        hash(Odd())
    model = nn.ModuleDict({"odd": Odd(), "linear": nn.Linear(1, 1)})
    assert list(model) == ["odd", "linear"]
