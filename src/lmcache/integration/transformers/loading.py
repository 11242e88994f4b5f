"""A model and its tokenizer from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelLoadError(ValueError):
    """A folder holds no model that can be loaded; the message says what is missing."""


def load_model(directory: Path, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """The causal language model in ``directory`` (config, weights, tokenizer, as ``save_pretrained`` writes them).

    It generates greedily: what its generation config says about sampling and penalties is put aside.

    Returns:
        A ``PreTrainedModel`` in evaluation mode and its tokenizer.

    Raises:
        ModelLoadError: the folder is not there, or not such a folder; or dtype or device do not exist here.
    """
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory: give the folder of a downloaded model")
    if not (directory / "config.json").is_file():
        raise ModelLoadError(f"{directory} has no config.json: give the folder of a Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], local_files_only=True)
        model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"cannot load {directory}: {error}") from error
    stops = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=stops[0] if isinstance(stops, list) else stops
    )
    return model.eval(), tokenizer
