from __future__ import annotations

import re
from typing import Any

import pytest

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.spelled import items, make_all


class Part:
    def __init__(self, name: str, **options: Any) -> None:
        if name == "unknown":
            raise ValueError("unknown part 'unknown'")
        self.name = name.lower()
        self.options = options


def test_names_and_options() -> None:
    made = make_all("--parts", "Sink(k=4), plain,attention(layers=[1, 2],heads=max, span=8),sink( k = 4 )", Part)
    assert {name: part.options for name, part in made.items()} == {
        "sink(k=4)": {"k": 4},
        "plain": {},
        "attention(layers=[1,2],heads=max,span=8)": {"layers": [1, 2], "heads": "max", "span": 8},
    }


def test_each_once() -> None:
    assert items("--budgets", "0.1, 0.2,0.1") == ["0.1", "0.2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--parts '': nothing stands before"),
        ("a,,b", "--parts 'a,,b': nothing stands before, between"),
        ("a(", "--parts: 'a(' must be NAME or NAME(OPTION=VALUE,…)"),
        ("a(k=1)b", "'a(k=1)b' must be NAME"),
        ("a(4)", "--parts: 'a(4)': '4' must be OPTION=VALUE"),
        ("a(k=)", "'k=' must be OPTION=VALUE"),
        ("unknown", "--parts: unknown part 'unknown'"),
    ],
)
def test_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(message)):
        make_all("--parts", text, Part)
