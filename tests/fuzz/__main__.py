"""usage: python -m tests.fuzz CORPUS [libFuzzer options]: coverage-guided, until it is stopped or finds something.

What it tries first, and what it learns, lies in the folder CORPUS. ``-max_total_time=60`` ends it after a minute.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lmcache.storage", "lmcache.segmentation", "lmcache.keys"]):
    from tests.fuzz.targets import FORMATS, TARGETS, VALUES


def one_input(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds() -> list[bytes]:
    values = [value for value in VALUES if len(value) < 1 << 16]
    found = [bytes([2, number]) + value for number, value in enumerate(values[: len(FORMATS)])]
    found += [b"\x00" + value for value in values]
    found += [b"\x05\x01$5\r\nhello\r\n$-1\r\n", b"\x05\x00+OK\r\n:12\r\n", b"\x06a:" + b"A" * 43 + b"="]
    return found


if __name__ == "__main__":
    import hashlib
    from pathlib import Path

    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
