"""The RAG part of the demo must not say that all is well when it is not."""

from __future__ import annotations

from dataclasses import replace

from demo.conversation import Answer
from demo.rag import ASKED, AskedQuestion, RagResult

PLAIN = Answer("How long?", "210 metres.", 1_600, 0, {}, 3.0)
BLENDED = replace(
    PLAIN, text="It is 210 metres.", reused_tokens=1_500, recomputed_tokens=220, seconds_to_first_token=1.0
)


def asked(blended: Answer = BLENDED, prefix: Answer = PLAIN, all_known: bool = True) -> AskedQuestion:
    return AskedQuestion((1, 2), all_known, {"no reuse": PLAIN, "prefix reuse": prefix, "CacheBlend": blended})


def test_a_good_result_has_no_problems() -> None:
    result = RagResult([asked(), asked(replace(BLENDED, reused_tokens=0), all_known=False)])
    assert result.problems() == []
    assert result.median_ratio() == 3.0
    assert result.table().row_count == 8


def test_what_must_not_be_is_told() -> None:
    assert "reused only 0" in RagResult([asked(replace(BLENDED, reused_tokens=0))]).problems()[0]
    assert "no answer" in RagResult([asked(replace(BLENDED, text=" "))]).problems()[0]
    assert "140 metres" in RagResult([asked(prefix=replace(PLAIN, text="140 metres."))]).problems()[0]


def test_some_questions_are_over_documents_that_are_all_known() -> None:
    seen: set[int] = set()
    known = []
    for _, parts in ASKED:
        known.append(seen.issuperset(parts))
        seen.update(parts)
    assert sum(known) >= 3
    assert seen == {1, 2, 3, 4, 5, 6}
