"""How far one answer is from another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Final

import torch

_NUMBERS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_DIGITS: Final = {word: str(number) for number, word in enumerate(_NUMBERS)}


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(softmax(``reference``) ‖ softmax(``logits``)) in nats, in float64; both ``[vocab]``."""
    expected = torch.log_softmax(reference.double(), dim=-1)
    found = torch.log_softmax(logits.double(), dim=-1)
    divergence = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    return max(0.0, float(divergence))  # rounding may leave −1e-17


def token_agreement(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """Share of positions at which two greedy answers have the same token.

    Each model went on from its *own* tokens, so a difference early on usually costs all that follows. Positions count
    up to the end of the longer answer: where only one goes on, they differ.
    """
    pairs = list(zip_longest(reference, tokens))
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else 1.0


def contains_answer(text: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand in ``text`` in a row.

    Case and punctuation do not matter, and "three" is "3".
    """
    return f" {_words(answer)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(_DIGITS.get(word, word) for word in re.findall(r"\w+", text.casefold()))
