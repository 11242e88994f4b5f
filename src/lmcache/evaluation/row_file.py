"""The rows of a run on disk, a line each, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import TracebackType

import msgspec
from blake3 import blake3

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.rows import BlendRow, FullPrefill, Settings
from lmcache.evaluation.variants import Variant


class RowFile:
    """Rows of one :class:`Settings` in a directory: other settings have another file, by their digest.

    The first line are the settings. A torn last line, of a run that was killed as it wrote, is cut off.

    Attributes:
        path: the file.
        full: the full prefills, by the task's digest.
        blends: the rows, by the task's digest and the variant.
    """

    def __init__(self, directory: Path, settings: Settings, *, fresh: bool = False) -> None:
        """Raises:
        OSError: the directory cannot be made or written.
        EvaluationError: the file is damaged in the middle, or another run is writing it.
        """
        header = msgspec.json.encode(settings)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"rows-{blake3(header).hexdigest(6)}.jsonl"
        self.full: dict[str, FullPrefill] = {}
        self.blends: dict[tuple[str, Variant], BlendRow] = {}
        self._file = self.path.open("a+b")
        try:
            self._lock()
            whole = 0 if fresh else self._load(header)
            self._file.truncate(whole)
            if whole == 0:
                self._write(header)
        except BaseException:
            self.close()
            raise

    def append(self, row: FullPrefill | BlendRow) -> None:
        """Keep ``row``, in memory and on disk."""
        self._remember(row)
        self._write(msgspec.json.encode(row))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"{self.path} is being written by another run; wait for it, or choose another --out"
            ) from None

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def _remember(self, row: FullPrefill | BlendRow) -> None:
        if isinstance(row, FullPrefill):
            self.full[row.task] = row
        else:
            self.blends[row.task, row.variant] = row

    def _load(self, header: bytes) -> int:
        """Read what is there; returns the number of bytes of whole lines."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        first, *others = content[:whole].splitlines() or [header]
        if first != header:
            raise EvaluationError(f"{self.path}:1: other settings than the name of the file says; pass --fresh")
        for number, line in enumerate(others, start=2):
            self._remember(self._decode(line, number))
        return whole

    def _decode(self, line: bytes, number: int) -> FullPrefill | BlendRow:
        try:
            return _decoder.decode(line)
        except msgspec.DecodeError as error:
            raise EvaluationError(f"{self.path}:{number}: {error}; remove the line, or pass --fresh") from None


_decoder: msgspec.json.Decoder[FullPrefill | BlendRow] = msgspec.json.Decoder(FullPrefill | BlendRow)
