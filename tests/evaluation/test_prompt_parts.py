from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.prompt_parts import prompt_parts
from lmcache.evaluation.tasks.task import Task
from tests.evaluation.tiny_model import CHAT_TEMPLATE, make_tokenizer

TASK = Task("file", 1, "Read the texts", ("She plays the harp.\n", "He plays."), "Which harp?")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE


def words(task: Task, chat_template: str | None) -> list[str]:
    tokenizer = make_tokenizer(chat_template)
    parts = prompt_parts(tokenizer, task)
    assert parts.input_ids == [token for part in parts.prompt for token in part]
    return [tokenizer.decode(part) for part in parts.prompt]


def test_the_chat_template_stands_around_the_passages() -> None:
    assert words(TASK, CHAT_TEMPLATE) == [
        "<|system|> Read the texts <|end|> <|user|>",
        "She plays the harp .",
        "He plays .",
        "Which harp ? <|end|> <|assistant|>",
    ]


def test_a_template_without_system_messages_finds_it_in_the_users() -> None:
    assert words(TASK, NO_SYSTEM)[0] == "<|user|> Read the texts"


def test_no_system_text_no_system_message() -> None:
    task = Task("file", 1, "", ("He plays.",), "Who?")
    assert words(task, CHAT_TEMPLATE)[0] == "<|user|>"
    assert words(task, None)[0] == ""


def test_without_a_template_the_texts_stand_alone() -> None:
    opening, *_, closing = words(TASK, None)
    assert opening == "Read the texts"
    assert closing == "Which harp ? Answer :"


def test_equal_passages_have_equal_ids_wherever_they_stand() -> None:
    tokenizer = make_tokenizer()
    swapped = Task("file", 2, TASK.system, TASK.passages[::-1], TASK.question)
    assert prompt_parts(tokenizer, TASK).passage_ids == prompt_parts(tokenizer, swapped).passage_ids[::-1]


@pytest.mark.parametrize("template", ["nothing", "{{ raise_exception('never') }}"])
def test_refuses_a_template_that_hides_the_message(template: str) -> None:
    with pytest.raises(EvaluationError, match="the tokenizer's chat template does not show"):
        prompt_parts(make_tokenizer(template), TASK)
