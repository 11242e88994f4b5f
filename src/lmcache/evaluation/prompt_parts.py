"""A task as the token ids of its parts, inside the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.tasks.task import Task

_SYSTEM: Final = "S0y1s2t3e4m"
_USER: Final = "U5s6e7r"


@dataclass(frozen=True)
class PromptParts:
    """Token ids. The prompt is ``system_ids``, all of ``passage_ids``, ``question_ids``, one after the other."""

    system_ids: tuple[int, ...]
    passage_ids: tuple[tuple[int, ...], ...]
    question_ids: tuple[int, ...]

    @property
    def prompt(self) -> list[list[int]]:
        """The parts in order."""
        return [list(part) for part in (self.system_ids, *self.passage_ids, self.question_ids)]

    @property
    def input_ids(self) -> list[int]:
        """The whole prompt."""
        return [token for part in self.prompt for token in part]


def prompt_parts(tokenizer: Any, task: Task) -> PromptParts:
    """``task`` for a transformers tokenizer, each part tokenised by itself; passages end with a blank line.

    With a chat template, everything ahead of the user's message belongs to the system part and everything behind it to
    the question; a template that knows no system message finds the system text in the user's. Without a template the
    question ends with "Answer:".

    Raises:
        EvaluationError: the chat template changes what a user writes.
    """
    opening, closing = _around(tokenizer, task.system)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    system_ids = encode(opening)
    if tokenizer.chat_template is None and tokenizer.bos_token_id is not None and _begins_with_bos(tokenizer):
        system_ids = (tokenizer.bos_token_id, *system_ids)
    return PromptParts(
        system_ids,
        tuple(encode(f"{passage.rstrip()}\n\n") for passage in task.passages),
        encode(task.question + closing),
    )


def _around(tokenizer: Any, system: str) -> tuple[str, str]:
    """What stands ahead of the first passage, and what stands behind the question."""
    if tokenizer.chat_template is None:
        return f"{system}\n\n" if system else "", "\nAnswer:"
    user = {"role": "user", "content": _USER}
    if system:
        text = _fill(tokenizer, [{"role": "system", "content": _SYSTEM}, user])
        if text is None:
            text = _fill(tokenizer, [{"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}])
    else:
        text = _fill(tokenizer, [user])
    if text is None or text.count(_USER) != 1 or (system and text.count(_SYSTEM) != 1):
        raise EvaluationError(
            "the tokenizer's chat template does not show a user's message as it is: cannot build prompts"
        )
    opening, closing = text.split(_USER)
    return opening.replace(_SYSTEM, system), closing


def _fill(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """The chat template filled with ``messages``; None when it refuses them (Gemma-2 knows no system message)."""
    from jinja2 import TemplateError

    try:
        # Templates of models that think aloud know the last argument: the first token is to be the answer's.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except TemplateError:
        return None
    return str(text)


def _begins_with_bos(tokenizer: Any) -> bool:
    return bool(tokenizer.encode("a")[:1] == [tokenizer.bos_token_id])
