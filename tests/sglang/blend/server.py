"""A real SGLang server with CacheBlend, whose blends can be made to fail or to go wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.sglang.generation_c import probed_server as probed
from tests.sglang.generation_c.probed_server import ProbedServer
from tests.sglang.server import MODEL, Generation

PLAIN = {"lmcache.blend": False, "lmcache.skip_load": True, "lmcache.skip_save": True}
LEARN = {"lmcache.blend": False}
WHOLE = {"lmcache.blend_ratio": 1.0, "lmcache.skip_save": True}
CONFIG = {"enable_blending": True, "chunk_size": 64, "blend_min_tokens": 64, "max_local_cpu_size": 1}


class BlendServer:
    def __init__(self, server: ProbedServer) -> None:
        self.probed = server

    def ask(self, tokens: Sequence[int], params: Mapping[str, Any], *, flush: bool = True, **more: Any) -> Generation:
        """Greedy; SGLang's own cache is emptied before, unless ``flush`` is off."""
        if flush:
            self.probed.flush()
        return self.probed.generate(tokens, custom_params=dict(params), **{"max_tokens": 8, **more})


@contextmanager
def blend_server(
    folder: Path, config: Mapping[str, Any] | None = None, *, page_size: int = 1, **more: Any
) -> Iterator[BlendServer]:
    with (
        patch.object(probed, "MODULE", "tests.sglang.blend.launch"),
        probed.probed_server(folder, {**CONFIG, **(config or {})}, page_size=page_size, **more) as server,
    ):
        yield BlendServer(server)


class Library:
    """Documents of readable text, and prompts of some of them in some order."""

    def __init__(self, documents: int = 5, tokens: int = 200) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.system = self.tokenizer.encode("You are a careful clerk. Answer from these parts of the shelf list.\n")
        self.documents = [self._document(number)[:tokens] for number in range(documents)]

    def prompt(self, order: Sequence[int], shelf: int = 3) -> list[int]:
        question = self.tokenizer.encode(f"\nHow many books are on shelf {shelf} of room {order[0]}? There are")
        return [*self.system, *(token for number in order for token in self.documents[number]), *question]

    def _document(self, number: int) -> list[int]:
        draw = random.Random(number)
        kinds = ("ships", "birds", "stars", "bridges", "tea")
        lines = (
            f"Shelf {shelf} of room {number} holds {draw.randrange(1000)} books about {draw.choice(kinds)}."
            for shelf in range(40)
        )
        tokens: list[int] = self.tokenizer.encode(" ".join(lines))
        return tokens

    def teach(self, server: BlendServer, **more: Any) -> None:
        for document in self.documents:
            server.ask([*self.system, *document], LEARN, max_tokens=1, **more)
