"""A model folder with a random Llama of a few thousand weights, whose tokens are words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.tasks.task import Task

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Knows the words of a few generated tasks; punctuation and unknown words are one token each."""
    words = sorted({word for task in generate_tasks(5) for word in _words(task)})
    vocabulary = {word: at for at, word in enumerate(("<unk>", *SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>", chat_template=chat_template
    )


def save_tiny_model(directory: Path) -> Path:
    """Random, but the same each time; answers nothing, and hardly ever stops."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _words(task: Task) -> list[str]:
    splitter = pre_tokenizers.Whitespace()
    return [
        word for text in (task.system, *task.passages, task.question) for word, _ in splitter.pre_tokenize_str(text)
    ]
