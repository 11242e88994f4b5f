"""The catalog of passages reads what it wrote, whatever has become of the rest of the file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import KEY_BYTES, CacheKey, PrefixKey, SegmentKey
from lmcache.segmentation.passage_catalog import FILE, PassageCatalog
from lmcache.segmentation.passage_row import PassageRow
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.encryption import KeyRing

KEYS = st.builds(
    lambda kind, raw: kind(raw), st.sampled_from([PrefixKey, SegmentKey]), st.binary(min_size=KEY_BYTES, max_size=48)
)
ROWS = st.builds(
    PassageRow,
    KEYS,
    st.lists(st.integers(0, 2**32 - 1), max_size=300).map(lambda tokens: np.array(tokens, np.uint32)),
    st.integers(0, 2**40),
    st.none() | KEYS,
    st.lists(st.integers(0, 300), max_size=4).map(tuple),
)


def row(number: int) -> PassageRow:
    tokens = np.random.default_rng(number).integers(0, 2**32, 256, np.uint32)
    return PassageRow(SegmentKey(bytes([number % 251]) * KEY_BYTES), tokens, 256 * number, None, (0,))


def write(directory: Path, rows: list[PassageRow]) -> None:
    catalog = PassageCatalog(directory)
    for each in rows:
        catalog.put(each)
    catalog.close()


def read(directory: Path) -> list[PassageRow]:
    catalog = PassageCatalog(directory)
    found = list(catalog.rows())
    catalog.close()
    return found


def plain(each: PassageRow) -> tuple[object, ...]:
    return type(each.key), each.key, each.tokens.tolist(), each.start, type(each.before), each.before, each.seams


@settings(max_examples=25)
@given(st.lists(ROWS, max_size=8, unique_by=lambda each: bytes(each.key)), st.data())
def test_rows_come_back_as_they_were_put_without_those_removed(rows: list[PassageRow], data: st.DataObject) -> None:
    gone: list[CacheKey] = data.draw(st.lists(st.sampled_from([each.key for each in rows]))) if rows else []
    with TemporaryDirectory() as name:
        catalog = PassageCatalog(Path(name))
        for each in rows:
            catalog.put(each)
        for key in gone:
            catalog.remove(key)
        catalog.close()
        assert list(map(plain, read(Path(name)))) == [plain(each) for each in rows if each.key not in gone]


@settings(max_examples=25)
@given(st.integers(0, 2), st.sampled_from(["key", "row", "digest"]), st.integers(0, 10_000), st.integers(1, 255))
def test_a_row_in_which_any_byte_changed_is_dropped_for_good(which: int, column: str, at: int, flip: int) -> None:
    rows = [row(number) for number in range(3)]
    with TemporaryDirectory() as name:
        write(Path(name), rows)
        with closing(sqlite3.connect(Path(name) / FILE)) as file, file:
            key = bytes(rows[which].key)
            (found,) = file.execute(f"SELECT {column} FROM passages_1 WHERE key = ?", (key,)).fetchone()
            broken = bytearray(found)
            broken[at % len(broken)] ^= flip
            file.execute(f"UPDATE passages_1 SET {column} = ? WHERE key = ?", (bytes(broken), key))
        kept = [plain(each) for each in rows[:which] + rows[which + 1 :]]
        assert list(map(plain, read(Path(name)))) == kept
        with closing(sqlite3.connect(Path(name) / FILE)) as file:
            assert file.execute("SELECT count(*) FROM passages_1").fetchone() == (2,)


def test_rows_of_nonsense_are_deleted(tmp_path: Path) -> None:
    write(tmp_path, [row(0)])
    with closing(sqlite3.connect(tmp_path / FILE)) as file, file:
        for key in (None, b"short", 7, 1.5, "text"):
            file.execute("INSERT INTO passages_1 VALUES (?, ?, ?)", (key, 3, "digest"))
        file.execute("INSERT INTO passages_1 VALUES (CAST(x'ff00' AS TEXT), x'', x'')")
    assert [each.key for each in read(tmp_path)] == [row(0).key]
    with closing(sqlite3.connect(tmp_path / FILE)) as file:
        assert file.execute("SELECT key FROM passages_1").fetchall() == [(bytes(row(0).key),)]


def test_damage_in_the_middle_of_the_file_costs_this_file_and_not_the_next(tmp_path: Path) -> None:
    """It opens well, so the damage shows only when all of it is read."""
    write(tmp_path, [row(number) for number in range(200)])
    size = (tmp_path / FILE).stat().st_size
    with open(tmp_path / FILE, "r+b") as file:
        file.seek(size // 4)
        file.write(b"\xff" * (size // 2))
    catalog = PassageCatalog(tmp_path)
    assert len(list(catalog.rows())) < 200
    catalog.put(row(500))
    catalog.close()
    assert (tmp_path / "passages.damaged").stat().st_size == size
    assert [each.key for each in read(tmp_path)] == [row(500).key]


def test_a_database_of_another_program_is_set_aside_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as file, file:
        file.execute("CREATE TABLE passages_1 (title TEXT)")
        file.execute("INSERT INTO passages_1 VALUES ('Moby-Dick')")
    write(tmp_path, [row(1)])
    assert [each.key for each in read(tmp_path)] == [row(1).key]
    with closing(sqlite3.connect(tmp_path / "passages.damaged")) as file:
        assert file.execute("SELECT * FROM passages_1").fetchall() == [("Moby-Dick",)]


def test_the_log_of_a_file_set_aside_is_not_played_into_the_new_one(tmp_path: Path) -> None:
    """A crash leaves the write-ahead log behind, and its pages would overwrite those of the fresh catalog."""
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with closing(sqlite3.connect(crashed / FILE)) as file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("CREATE TABLE other (value BLOB)")
        file.execute("INSERT INTO other VALUES (zeroblob(20000))")
        file.commit()
        for name in (FILE, FILE + "-wal"):
            (tmp_path / name).write_bytes((crashed / name).read_bytes())
    assert (tmp_path / (FILE + "-wal")).stat().st_size
    (tmp_path / FILE).write_bytes(b"overwritten by something else " * 500)
    write(tmp_path, [row(1)])
    assert [each.key for each in read(tmp_path)] == [row(1).key]


def test_integers_of_numpy_are_integers(tmp_path: Path) -> None:
    write(tmp_path, [row(1)._replace(start=np.int64(7), seams=(np.int32(3),)), row(2)])
    assert [(each.start, each.seams) for each in read(tmp_path)] == [(7, (3,)), (512, (0,))]


def test_what_does_not_fit_the_queue_is_dropped_and_counted(tmp_path: Path) -> None:
    catalog = PassageCatalog(tmp_path)
    catalog.close()  # nobody takes from the queue any more
    for _ in range(catalog._queue.maxsize + 3):
        catalog.put(row(0))
    assert catalog.dropped == 3


# Encrypted

BY_OLD, BY_NEW = ChunkFormat(keys=KeyRing({"1": bytes(32)})), ChunkFormat(keys=KeyRing({"2": b"2" * 32}))
BY_BOTH = ChunkFormat(keys=KeyRing({"2": b"2" * 32, "1": bytes(32)}))


def tokens_lie_in(directory: Path, each: PassageRow) -> bool:
    return any(each.tokens.tobytes()[:64] in path.read_bytes() for path in directory.iterdir())


def rows_by(directory: Path, chunk_format: ChunkFormat, put: list[PassageRow] | None = None) -> list[PassageRow]:
    catalog = PassageCatalog(directory, chunk_format)
    found = list(catalog.rows())
    for each in put or []:
        catalog.put(each)
    catalog.close()
    return found


def test_tokens_do_not_lie_there_in_the_clear(tmp_path: Path) -> None:
    rows_by(tmp_path, BY_OLD, [row(1)])
    assert not tokens_lie_in(tmp_path, row(1))
    assert [plain(each) for each in rows_by(tmp_path, BY_OLD)] == [plain(row(1))]


def test_rows_of_old_keys_are_read_and_those_of_others_dropped(tmp_path: Path) -> None:
    rows_by(tmp_path, BY_OLD, [row(1)])
    assert [plain(each) for each in rows_by(tmp_path, BY_BOTH, [row(2)])] == [plain(row(1))]
    assert [plain(each) for each in rows_by(tmp_path, BY_NEW)] == [plain(row(2))]


def test_switching_encryption_on_removes_what_lies_in_the_clear(tmp_path: Path) -> None:
    write(tmp_path, [row(1)])
    (tmp_path / "passages.damaged").write_bytes((tmp_path / FILE).read_bytes())
    assert tokens_lie_in(tmp_path, row(1))
    assert rows_by(tmp_path, BY_OLD, [row(2)]) == []
    assert not tokens_lie_in(tmp_path, row(1))
    assert [plain(each) for each in rows_by(tmp_path, BY_OLD)] == [plain(row(2))]


def test_without_its_key_a_sealed_catalog_is_set_aside(tmp_path: Path) -> None:
    rows_by(tmp_path, BY_OLD, [row(1)])
    assert read(tmp_path) == []
    write(tmp_path, [row(2)])
    assert [plain(each) for each in read(tmp_path)] == [plain(row(2))]
