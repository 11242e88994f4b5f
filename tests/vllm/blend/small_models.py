"""Small models with random weights in a real vLLM, one after the other in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from tests.transformers.small_models import CONFIGS, VOCAB

HEAD_DIM = 32  # the smallest that vLLM's attention on the CPU takes

# Architectures that cannot be blended
OTHERS: dict[str, Callable[[], Any]] = {
    "deepseek-v2": lambda: transformers.DeepseekV2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=128, n_layer=2, n_head=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=128, n_layer=2, n_head=4, n_positions=2048),
}


def config(name: str) -> Any:
    """That of :mod:`tests.transformers.small_models`, with heads as vLLM's attention wants them."""
    if name in OTHERS:
        return OTHERS[name]()
    made = CONFIGS[name]()
    made.tie_word_embeddings = name.startswith(("cohere", "gemma"))  # vLLM knows these no other way, others no such way
    made.hidden_size = HEAD_DIM * made.num_attention_heads
    if hasattr(made, "head_dim"):
        made.head_dim = HEAD_DIM
    if name == "gpt-oss":
        made.rope_parameters.update(beta_fast=32.0, beta_slow=1.0)  # vLLM knows no defaults for them
    return made


def save(name: str, folder: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


@contextmanager
def serving(name: str, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` with :class:`tests.vllm.blend.step_connector.StepConnector`."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from tests.vllm.blend.step_connector import CONFIG, StepConnector

    with TemporaryDirectory() as folder:
        save(name, str(Path(folder)))
        llm = LLM(
            model=folder,
            enforce_eager=True,
            max_model_len=1024,
            num_gpu_blocks_override=128,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            max_logprobs=-1,
            kv_transfer_config=KVTransferConfig(**CONFIG),
            **{"dtype": "float32", **options},
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            StepConnector.model = StepConnector.job = None
            del llm
            gc.collect()


def next_logprobs(llm: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[vocab]``: what vLLM itself says of the token behind ``ids``."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids.tolist()}], sampling, use_tqdm=False)
    (said,) = output.outputs[0].logprobs
    return torch.tensor([said[token].logprob for token in range(VOCAB)])
