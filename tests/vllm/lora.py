"""A LoRA adapter with random weights for SmolLM2, in the format that vLLM loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.vllm.harness import model_path


def write_random_adapter(folder: Path, seed: int, rank: int = 8) -> Path:
    """An adapter on the query and value projections, large enough to change the text."""
    config = json.loads((model_path() / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    widths = {"q_proj": hidden, "v_proj": hidden // heads * config["num_key_value_heads"]}
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden, generator=random) / hidden**0.5
            weights[f"{stem}.lora_B.weight"] = torch.randn(width, rank, generator=random) / rank**0.5
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": rank,
                "lora_alpha": rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": list(widths),
                "base_model_name_or_path": str(model_path()),
            }
        )
    )
    return folder
