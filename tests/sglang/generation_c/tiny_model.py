"""A small random Llama whose heads two ranks can share, with SmolLM2's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.sglang.server import MODEL


def tiny_model(folder: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(MODEL)),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    for file in MODEL.glob("*token*"):
        shutil.copy(file, folder)
    return folder
