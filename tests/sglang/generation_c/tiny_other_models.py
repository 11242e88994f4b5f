"""Configurations of small models that keep more than the KV of full attention; their weights are SGLang's to make up
(``--load-format dummy``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.sglang.server import MODEL

_SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "recurrent state": {
        **_SIZES,
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
        "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
    },
}  # fmt: skip
"""By what they keep besides. None with a sliding window: on a CPU SGLang 0.5.23 has no attention for one whose slots
slide out, and ends before it asks us; ``test_connector`` has that refusal."""


def write_other_model(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OTHER_MODELS[kind]))
    for file in MODEL.glob("*token*"):
        shutil.copy(file, folder)
    return folder
