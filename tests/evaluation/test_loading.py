from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from lmcache.integration.transformers.loading import ModelLoadError, load_model
from tests.evaluation.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_loads_a_model_that_answers_greedily(folder: Path) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.3, "eos_token_id": 4})
    )
    model, tokenizer = load_model(folder, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.generation_config.eos_token_id == 4
    assert not model.generation_config.do_sample
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert tokenizer.chat_template is not None


def test_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="absent is not a directory: give the folder of a downloaded model"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelLoadError, match=r"has no config.json: give the folder of a Hugging Face model"):
        load_model(tmp_path)
    with pytest.raises(ModelLoadError, match="dtype 'int8': choose from float32, bfloat16, float16"):
        load_model(folder, "int8")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(tmp_path)
