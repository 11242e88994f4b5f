"""A model's configuration as far as a connector reads it, and pools of its shape, without any SGLang."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LAYERS, HEADS, DIM, SLOTS = 3, 2, 4, 128


class _Config:
    architectures = ("LlamaForCausalLM",)

    def to_dict(self) -> dict[str, Any]:
        return {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "head_dim": DIM}


def model_config(folder: Path) -> Any:
    """SGLang's ``ModelConfig``, in outline."""
    return SimpleNamespace(
        model_path=str(folder),
        revision=None,
        dtype=torch.bfloat16,
        quantization=None,
        hf_config=_Config(),
        hf_text_config=_Config(),
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=DIM,
        v_head_dim=DIM,
        attention_arch=None,
        get_num_kv_heads=lambda tp_size: HEADS,
    )


def pools() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V of every layer, each slot's numbers its own."""

    def pool(number: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        return torch.randint(-99, 99, (SLOTS, HEADS, DIM), generator=random).to(torch.bfloat16)

    return [pool(layer) for layer in range(LAYERS)], [pool(100 + layer) for layer in range(LAYERS)]
