"""What one run gives for one task: a line each of the row file."""

from __future__ import annotations

import msgspec

from lmcache.evaluation.variants import Variant


class Settings(msgspec.Struct, frozen=True, tag="settings"):
    """All that figures of a task depend on, beside task and variant. Rows of other settings are never mixed.

    ``code`` is a digest of this package's source, ``weights`` one of the model's files. Processor and threads are here
    because the figures include times.
    """

    model: str
    weights: str
    dtype: str
    context: str
    answer_tokens: int
    threads: int
    processor: str
    versions: dict[str, str]
    code: str


class FullPrefill(msgspec.Struct, frozen=True, tag="full_prefill"):
    """The answer that all others are compared with, of the model itself, without this package.

    ``answered``: whether it contains the expected answer; None when the task has none. ``seconds`` are of the prefill.
    """

    task: str
    kind: str
    seed: int
    num_tokens: int
    tokens: tuple[int, ...]
    text: str
    answered: bool | None
    seconds: float


class BlendRow(msgspec.Struct, frozen=True, tag="blend"):
    """One variant on one task.

    ``charged_budget``, ``seconds``: as measured. ``packed_ratio`` and ``packed_error`` are what the codec did to the
    reused KV: raw bytes over packed ones, and the root mean square of the error over that of the numbers.
    ``kl`` in nats at the first answer token; ``agreement`` of the greedy tokens, 0 … 1; ``fallback`` is why nothing was
    reused, if so.
    """

    task: str
    variant: Variant
    charged_budget: float
    kl: float
    agreement: float
    answered: bool | None
    tokens: tuple[int, ...]
    seconds: float
    fallback: str | None
    packed_ratio: float = 1.0
    packed_error: float = 0.0
