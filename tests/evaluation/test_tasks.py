from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.evaluation.measures import contains_answer
from lmcache.evaluation.tasks.generate import KINDS, generate_task, generate_tasks
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import Size

SIZES = st.builds(Size, st.integers(2, 20), st.integers(1, 300))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    @given(seed=st.integers(0, 2**40), size=SIZES)
    def test_has_what_was_asked_for(self, kind: str, seed: int, size: Size) -> None:
        task = generate_task(kind, seed, size)
        assert task == generate_task(kind, seed, size)
        assert (task.kind, task.seed) == (kind, seed)
        assert len(task.passages) == len(set(task.passages)) == size.num_passages
        assert all(len(passage.split()) >= size.passage_words for passage in task.passages)
        assert not any("{" in text for text in (*task.passages, task.question))

    @given(seed=st.integers(0, 1000))
    def test_default_passages_are_of_a_like_length_and_repeat_no_sentence(self, kind: str, seed: int) -> None:
        for passage in generate_task(kind, seed).passages:
            sentences = passage.split(". ")
            assert len(sentences) == len(set(sentences))
            assert 120 <= len(passage.split()) <= 140

    def test_survives_json(self, kind: str) -> None:
        task = generate_task(kind, 3)
        assert msgspec.json.decode(msgspec.json.encode(task), type=Task) == task

    def test_seeds_differ(self, kind: str) -> None:
        assert len({generate_task(kind, seed).passages for seed in range(50)}) == 50


@given(seed=st.integers(0, 1000))
def test_a_single_fact_stands_in_one_passage_with_its_subject(seed: int) -> None:
    task = generate_task("single_fact", seed)
    assert task.answer is not None
    assert any(contains_answer(passage, task.answer) for passage in task.passages)


@given(seed=st.integers(0, 1000))
def test_two_hops_start_in_a_passage_that_does_not_tell_the_answer(seed: int) -> None:
    task = generate_task("two_hop", seed)
    name = next(words for words in (" ".join(p) for p in _name_pairs(task.question)) if _portraits(task, words))
    (portrait,) = _portraits(task, name)
    assert task.answer is not None
    others = [passage for passage in task.passages if passage != portrait]
    assert any(contains_answer(passage, task.answer) for passage in others)


@given(seed=st.integers(0, 1000))
def test_counting_counts(seed: int) -> None:
    task = generate_task("counting", seed)
    instrument = task.question.split("play the ")[1].split("?")[0]
    assert task.answer == str(sum(contains_answer(passage, f"the {instrument}") for passage in task.passages))


@given(seed=st.integers(0, 1000))
def test_ordering_agrees_with_the_years_that_the_passages_tell(seed: int) -> None:
    task = generate_task("ordering", seed)
    _, rest = task.question.split("opened ")
    extreme, names = rest.split(", the ", 1)
    years = [_year(task, name) for name in names.rstrip("?").split(" or the ")]
    wanted = (min if extreme == "first" else max)(range(2), key=years.__getitem__)
    assert task.answer == names.rstrip("?").split(" or the ")[wanted]


def test_kinds_take_turns_and_more_tasks_begin_with_the_same() -> None:
    tasks = generate_tasks(12)
    assert [task.kind for task in tasks[:6]] == [*KINDS, "single_fact"]
    assert generate_tasks(30)[:12] == tasks
    assert {task.kind for task in generate_tasks(5, kinds=["two_hop"])} == {"two_hop"}
    assert not set(generate_tasks(20, seed=1)) & set(generate_tasks(20, seed=2))


def test_tasks_stay_the_same_between_releases() -> None:
    task = generate_task("two_hop", 0, Size(num_passages=2, passage_words=1))
    assert task.passages == (
        "Walter Sandoval is a photographer from Ashford. He would never part with a tortoise. He plays the harp in an "
        "amateur orchestra. For some years now he has been employed by the Ivory Press. His favourite meal is ginger "
        "biscuits.",
        "In the centre of Bristol lies the Ivory Press. Most people come for a marble fountain. The first visitors "
        "were let in during the spring of 1785. The idea came from Victoria Hadley, who founded it against all "
        "advice. It is built of yellow sandstone.",
    )
    assert task.question == "Question: In which year was the place opened where Walter Sandoval works?"
    assert task.answer == "1785"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate_task("riddle", 0), "'riddle' is no kind of task: choose from single_fact"),
        (lambda: generate_tasks(-1), "count=-1"),
        (lambda: generate_tasks(1, kinds=[]), "a kind"),
        (lambda: Size(num_passages=1), "num_passages=1: must be 2 … 20"),
        (lambda: Size(passage_words=301), "passage_words=301"),
    ],
)
def test_says_what_is_wrong(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def _name_pairs(text: str) -> list[tuple[str, str]]:
    return list(pairwise(text.rstrip("?").split()))


def _portraits(task: Task, name: str) -> list[str]:
    """The passages that begin with this person, as portraits do."""
    return [passage for passage in task.passages if name in passage.split(". ")[0]]


def _year(task: Task, name: str) -> int:
    (passage,) = _portraits(task, name)
    for sentence in passage.split(". "):
        for before_or_after, sign in ((" years before the ", -1), (" years after the ", 1)):
            for words in (before_or_after, before_or_after.replace("years", "year")):
                if words in sentence and "opened" in sentence:
                    distance, other = sentence.split(words)
                    number = distance.split()[-1]
                    return _year(task, other.split(",")[0].rstrip(".")) + sign * (1 if number == "one" else int(number))
    return next(int(word) for word in passage.replace(".", " ").split() if word.isdigit() and len(word) == 4)
