from __future__ import annotations

import pytest
import torch

from lmcache.observability import ranges
from lmcache.observability.ranges import Range


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(ranges, "_has_nvtx", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("end"))
    return found


def test_ranges_nest_and_end_when_something_is_raised(seen: list[str]) -> None:
    @Range("inner")
    def fails() -> None:
        raise OSError("injected")

    with pytest.raises(OSError, match="injected"), Range("outer"):
        fails()
    assert seen == ["lmcache: outer", "lmcache: inner", "end", "end"]


def test_without_cuda_nothing_is_called(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_has_nvtx", lambda: False)
    with Range("a"):
        pass
    assert seen == []


def test_the_phases_of_a_blend_have_names(seen: list[str]) -> None:
    from lmcache.blend.blend_pass import blend
    from tests.blend.core.test_blend import ROPES, AsItIs, Asking, two_passages
    from tests.blend.core.tiny_model import TinyHost, TinyModel

    ids, prompt = two_passages()
    blend(TinyHost(TinyModel(), [ids]), [prompt], ROPES, Asking(), AsItIs())
    assert seen.count("end") * 2 == len(seen)
    assert {"lmcache: probe", "lmcache: load layer", "lmcache: correct", "lmcache: recompute"} <= set(seen)
