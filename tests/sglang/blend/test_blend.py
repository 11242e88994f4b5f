"""CacheBlend inside a real SGLang server: right, and never mistaken for exact KV."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import pytest

from tests.sglang.blend.faults import STEPS
from tests.sglang.blend.server import LEARN, PLAIN, WHOLE, BlendServer, Library, blend_server

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ORDERS = list(permutations(range(5), 3))[7::14]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, library: Library) -> Iterator[BlendServer]:
    with blend_server(tmp_path_factory.mktemp("blend")) as started:
        library.teach(started)
        yield started


def test_ratio_one_is_plain_sglang(server: BlendServer, library: Library) -> None:
    for order in ORDERS:
        prompt = library.prompt(order)
        plain, blended = server.ask(prompt, PLAIN), server.ask(prompt, WHOLE)
        assert plain.storage == 0
        assert blended.storage > 0.9 * len(prompt)
        assert blended.tokens == plain.tokens


def test_passages_are_reused_at_fifteen_percent(server: BlendServer, library: Library) -> None:
    prompt = library.prompt(ORDERS[0])
    assert server.ask(prompt, {"lmcache.skip_save": True}).storage > 0.9 * len(prompt)
    metrics = server.probed.state()["metrics"]
    print({name: value for name, value in metrics.items() if "blend" in name})


def test_requests_choose_for_themselves(server: BlendServer, library: Library) -> None:
    prompt = library.prompt(ORDERS[1])
    assert server.ask(prompt, {"lmcache.blend": False, "lmcache.skip_save": True}).storage <= 0.5 * len(prompt)
    assert server.ask(prompt, {"lmcache.blend_ratio": 7, "lmcache.skip_save": True}).storage <= 0.5 * len(prompt)
    assert server.ask(prompt, {"lmcache.skip_save": True}, salt="somebody else").storage == 0


def test_radix_hits_stand_in_front(server: BlendServer, library: Library) -> None:
    """What SGLang's own tree has of the prompt is not loaded again from anywhere else, and stays exact."""
    prompt = library.prompt(ORDERS[2])
    plain = server.ask(prompt, PLAIN)
    start = prompt[: len(library.system) + 150]
    server.ask([*start, 5, 6, 7], PLAIN, max_tokens=1)
    assert server.ask(prompt, WHOLE, flush=False).tokens == plain.tokens
    again = server.ask([*start, 5, 6, 7, 8], PLAIN, flush=False, max_tokens=1)
    assert again.own >= 150 // 16 * 16


def test_blended_kv_is_nobody_elses(server: BlendServer, library: Library) -> None:
    """The tree is asked in every way for what a blend has left in it; all answers are those of plain SGLang."""
    farthest = {"lmcache.blend_ratio": 0.0}
    for order in ORDERS[:3]:
        prompt = library.prompt(order, shelf=9)
        plain = server.ask(prompt, PLAIN)
        longer = [*prompt, *plain.tokens[:4], 42]
        plain_longer = server.ask(longer, PLAIN)
        server.ask(prompt, farthest)
        assert server.ask(prompt, PLAIN, flush=False).tokens == plain.tokens, "after a blend"
        assert server.ask(prompt, LEARN, flush=False).tokens == plain.tokens, "after a blend, with our prefixes"
        assert server.ask(longer, PLAIN, flush=False).tokens == plain_longer.tokens, "as the beginning of another"
        server.probed.flush()
        with ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(server.ask, prompt, params, flush=False) for params in (farthest, PLAIN, farthest, PLAIN)
            ]
        assert asked[1].result().tokens == asked[3].result().tokens == plain.tokens, "in flight together"
        assert server.ask(prompt, LEARN).tokens == plain.tokens, "from our prefixes alone"


def test_many_at_once(server: BlendServer, library: Library) -> None:
    prompts = [library.prompt(order, shelf=5) for order in ORDERS]
    alone = [server.ask(prompt, {"lmcache.skip_save": True}) for prompt in prompts]
    server.probed.flush()
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(
            threads.map(lambda prompt: server.ask(prompt, {"lmcache.skip_save": True}, flush=False), prompts)
        )
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_every_step_may_fail(server: BlendServer, library: Library) -> None:
    prompt = library.prompt(ORDERS[3], shelf=1)
    plain = server.ask(prompt, PLAIN, max_tokens=4)
    for fault in STEPS:
        with server.probed.failing(fault):
            assert server.ask(prompt, WHOLE, max_tokens=4).tokens == plain.tokens, fault
    assert server.probed.is_healthy()
    assert server.ask(prompt, WHOLE, max_tokens=4).storage > 0.9 * len(prompt)


def test_nothing_is_left(server: BlendServer, library: Library) -> None:
    """After aborts too. SGLang refuses to flush while anything of a request is held, and says so when slots leak."""
    prompts = [library.prompt(order, shelf=7) for order in ORDERS]
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [
            threads.submit(server.ask, prompt, {}, flush=False, request_id=f"aborted-{number}", max_tokens=64)
            for number, prompt in enumerate(prompts)
        ]
        for number in range(0, len(prompts), 2):
            server.probed.abort(f"aborted-{number}")
        for answer in asked:
            answer.result()
    server.probed.flush()
    state = server.probed.state()
    assert state["open"] == 0
    assert not state["leaks"]
    assert "memory leak" not in server.probed.log()


def test_whole_pages(tmp_path: Path, library: Library) -> None:
    with blend_server(tmp_path, page_size=16) as paged:
        library.teach(paged)
        for order in ORDERS[:2]:
            prompt = library.prompt(order)
            plain, blended = paged.ask(prompt, PLAIN), paged.ask(prompt, WHOLE)
            assert blended.tokens == plain.tokens
            assert blended.storage == (len(prompt) - 1) // 16 * 16
        start = library.prompt(ORDERS[2])[: len(library.system) + 150]
        paged.ask([*start, 5, 6, 7], PLAIN, max_tokens=1)
        plain = paged.ask(library.prompt(ORDERS[2]), WHOLE, flush=False)
        assert plain.tokens == paged.ask(library.prompt(ORDERS[2]), PLAIN).tokens
        paged.probed.flush()
        assert not paged.probed.state()["leaks"]


def test_two_ranks(tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    from tests.sglang.generation_c.tiny_model import tiny_model

    model = tiny_model(tmp_path / "model")
    with blend_server(tmp_path, model=model, arguments=["--tp-size", "2"]) as ranks:
        library.teach(ranks)
        for order in ORDERS[:3]:
            prompt = library.prompt(order)
            plain, blended = ranks.ask(prompt, PLAIN), ranks.ask(prompt, WHOLE)
            assert blended.tokens == plain.tokens
            assert blended.storage > 0.9 * len(prompt)
            assert ranks.ask(prompt, {"lmcache.skip_save": True}).storage > 0.9 * len(prompt)
