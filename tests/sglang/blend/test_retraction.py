"""SGLang takes back the slots of a blended request in mid-answer, and lets it begin again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sglang.blend.server import PLAIN, WHOLE, Library, blend_server
from tests.sglang.server import Generation

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NEW = 60
# SGLang's own switch for its tests: it takes the slots of a request back every so many forwards, as for want of room.
EVERY = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "25"}
ORDERS = [(0, 1), (1, 2), (2, 0), (1, 0)]


def test_retracted_blends_and_their_neighbours_answer_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in EVERY.items():
        monkeypatch.setenv(name, value)
    library = Library(documents=3, tokens=100)
    prompts = [library.prompt(order) for order in ORDERS]
    kinds = [PLAIN, PLAIN, WHOLE, WHOLE]
    with blend_server(tmp_path) as server:
        library.teach(server)
        alone = [server.ask(prompt, PLAIN, max_tokens=NEW) for prompt in prompts]
        server.probed.flush()

        def ask(number: int) -> Generation:
            time.sleep(0.3 * number)  # SGLang takes back from those that came last
            return server.ask(prompts[number], kinds[number], flush=False, max_tokens=NEW)

        with ThreadPoolExecutor(len(prompts)) as threads:
            together = list(threads.map(ask, range(len(prompts))))
        retracted = [answer.retractions for answer in together]
        print(f"retractions: {retracted}; from passages: {[answer.storage for answer in together]}")
        assert sum(retracted[2:]) > 0, "a blended request was to be retracted"
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        assert any(answer.storage > 0 for answer in together[2:])
        again = server.ask(prompts[2], WHOLE, max_tokens=8)
        assert again.storage > 0.9 * len(prompts[2]), "blends go on"
        assert again.tokens == alone[2].tokens[:8]
        server.probed.flush()
        state = server.probed.state()
        assert state["open"] == 0
        assert not state["leaks"]
        assert "memory leak" not in server.probed.log()
