"""A small Llama with random weights whose heads can be divided by four."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB = 512


def save(folder: Path) -> None:
    """Write it to ``folder``, the same bytes every time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        # Wide enough for attention to be far from uniform.
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()
