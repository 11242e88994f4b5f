"""Reads documents into a server's cache behind the system prompt that they will be used with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from lmcache.client.server import Server, ServerError

PLACE = "{document}"


class DocumentError(Exception):
    """A document cannot be read."""


@dataclass
class WarmReport:
    """What became of each document: ``failed`` says why."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def find_documents(paths: Iterable[Path]) -> list[Path]:
    """Files as they are; of a directory, every .txt and .md file below it."""
    found: list[Path] = []
    for path in paths:
        below = (
            sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".md"))
            if path.is_dir()
            else [path]
        )
        found.extend(below)
    return list(dict.fromkeys(found))


def warm(
    server: Server,
    model: str,
    system: str,
    documents: Iterable[Path],
    *,
    template: str = PLACE,
    parallel: int = 4,
    state: Path | None = None,
    on_progress: Callable[[Path], None] = lambda path: None,
) -> WarmReport:
    """Send each document once, as a user's message behind ``system``, so that the server computes and keeps its KV.

    Args:
        template: how the document is embedded in the message; holds ``{document}``.
        parallel: requests at a time.
        state: file of what is done, appended to after each document; what it names is not sent again.
        on_progress: called from this thread after each document, whatever became of it.

    Raises:
        OSError: ``state`` cannot be written.
        ValueError: ``template`` has no ``{document}``, or ``parallel`` is below 1.
    """
    if PLACE not in template:
        raise ValueError(f"template {template!r}: must hold {PLACE}")
    if parallel < 1:
        raise ValueError(f"parallel={parallel}: must be at least 1")
    report = WarmReport()
    known = _read_state(state)
    if state is not None:
        state.open("a").close()  # before anything is sent for nothing

    def send(path: Path) -> str:
        text = template.replace(PLACE, _read(path))
        name = blake3("\0".join((server.root, model, system, text)).encode()).hexdigest()
        if name in known:
            return ""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        # Not blended itself: its KV is to be of the system prompt and the document alone.
        body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
        server.post("/v1/chat/completions", {**body, "kv_transfer_params": {"lmcache.blend": False}})
        return name

    pool = ThreadPoolExecutor(parallel)
    try:
        sent = {pool.submit(send, path): path for path in documents}
        for done in as_completed(sent):
            path = sent[done]
            try:
                if name := done.result():
                    report.done.append(path)
                    _append_state(state, name)
                else:
                    report.skipped.append(path)
            except (ServerError, DocumentError) as error:
                report.failed[path] = str(error)
            on_progress(path)
    finally:
        # Stopped by the user or a full disk: only what is in flight is waited for.
        pool.shutdown(cancel_futures=True)
    return report


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot be read as text: {error}") from None
    if "\0" in text:
        raise DocumentError("is no text: it holds zero bytes")
    if not text.strip():
        raise DocumentError("is empty")
    return text


def _read_state(state: Path | None) -> set[str]:
    if state is None or not state.exists():
        return set()
    names = set()
    for line in state.read_text(encoding="utf-8").splitlines():
        try:
            names.add(str(json.loads(line)["done"]))
        except (ValueError, KeyError, TypeError):  # noqa: PERF203 - the last line of a run that was killed
            continue
    return names


def _append_state(state: Path | None, name: str) -> None:
    if state is not None:
        with state.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({'done': name})}\n")
