"""Build one of the virtual environments that ``make`` runs in. Standard library only.

usage: setup_environment.py FOLDER ENGINE_LOCK TOOLS_LOCK

The locks are requirement files that list every package: those of the engine, PyTorch among them, and ours.

FOLDER is removed first, so that an interrupted run leaves nothing behind that counts: ``FOLDER/.complete`` is written
last, and only it says that the environment is whole. Of two runs at once the second waits for the first and uses what
that built. pip's full output goes to ``FOLDER.log``.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN_LINES = 15.0  # where the output is a file, such as a CI log


class Progress:
    """One line that is kept up to date on a terminal; a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._start = time.monotonic()
        self._last = 0.0
        self._terminal = sys.stdout.isatty()
        print(title, flush=True)

    def show(self, status: str) -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        line = f"  {now - self._start:4.0f} s  {status}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        else:
            print(line, flush=True)

    def done(self) -> None:
        self._last = 0.0
        self.show("done")
        if self._terminal:
            print(flush=True)


def pip_install(python: Path, log: Path, title: str, *arguments: str, packages: int | None = None) -> None:
    """``pip install``; ``packages`` is how many the environment will hold, where that is known beforehand."""
    progress = Progress(title)
    total = f" of {packages}" if packages else ""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    site_packages = next(python.parents[1].glob("lib/python*/site-packages"))
    collected = 0
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        with log.open() as lines:
            status = "starting pip"
            lines.seek(0, os.SEEK_END)
            while process.poll() is None:
                for line in lines:
                    if match := re.match(r"Collecting (\S+)", line):
                        collected += 1
                        status = f"fetching {collected}{total}: {match[1]}"
                    elif line.startswith("Installing collected packages"):
                        status = ""
                installed = len(list(site_packages.glob("*.dist-info")))
                progress.show(status or f"installing {installed}{total}")
                time.sleep(0.2)
    if process.returncode:
        tail = [line for line in log.read_text().splitlines() if not line.startswith("WARNING")][-30:]
        print("\n".join(["", *tail, "", f"pip failed; the whole log is {log}"]), file=sys.stderr)
        raise SystemExit(1)
    progress.done()


def count_requirements(*files: Path) -> int:
    return sum(bool(re.match(r"[A-Za-z]", line)) for file in files for line in file.read_text().splitlines())


def build(folder: Path, engine: Path, tools: Path, log: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.truncate(log, 0)
    print(f"Building {folder.name} (once; about five minutes and 3 GB on two cores)", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # torch with its dependencies, since which ones it has depends on the build that pip finds (CPU or CUDA);
    # all others exactly as listed.
    pip_install(python, log, "1/2 PyTorch", "--constraint", str(engine), "torch")
    pip_install(
        python,
        log,
        "2/2 the engine and the tools",
        *("--no-deps", "--requirement", str(engine), "--requirement", str(tools)),
        packages=count_requirements(engine, tools),
    )
    (folder / ".complete").touch()


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    folder, engine, tools = (Path(argument).absolute() for argument in sys.argv[1:])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".log").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            build(folder, engine, tools, Path(lock.name))


if __name__ == "__main__":
    main()
