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
    "sliding window": {
        **_SIZES,
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 2, "head_dim": 16,
        "global_head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 49152,
        "enable_moe_block": False, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    },
    "recurrent state": {
        **_SIZES,
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
        "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
    },
}  # fmt: skip
"""By what they keep besides: layers that see a window only, and layers with a state of the whole prompt."""


def write_other_model(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OTHER_MODELS[kind]))
    for file in MODEL.glob("*token*"):
        shutil.copy(file, folder)
    return folder
