"""Unpack the Python sources of the SGLang versions that requirements/sglang-sources.txt lists.

usage: fetch_sglang_sources.py FOLDER

``FOLDER/0.5.12/sglang`` and so on appear only when they are whole; what is there is not fetched again. Standard library
only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements" / "sglang-sources.txt"
# The wheel of one platform for every machine: only its Python files are used, and one hash vouches for them.
WHEEL = ["--platform", "manylinux_2_34_x86_64", "--implementation", "cp", "--python-version", "3.11"]


def fetch(requirement: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.unfinished-") as scratch:
        lock = Path(scratch, "lock.txt")
        lock.write_text(requirement + "\n")
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", *WHEEL, "--dest", scratch, "--requirement", str(lock)]
        subprocess.run(command, check=True)
        sources = Path(scratch, "sources")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(sources, [name for name in wheel.namelist() if not name.endswith(".so")])
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(sources, folder)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for requirement in LOCK.read_text().splitlines():
        if match := re.match(r"sglang==([\w.]+)", requirement):
            folder = Path(sys.argv[1], match[1])
            if not (folder / "sglang" / "__init__.py").exists():
                print(f"Fetching the sources of SGLang {match[1]}", flush=True)
                fetch(requirement, folder)


if __name__ == "__main__":
    main()
