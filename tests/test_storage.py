"""Files of a round: whole or absent, in parts, beside their checksums."""

import math
import os
from pathlib import Path

import pytest

from fastdpo import storage
from fastdpo.errors import DataError


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "part-00000.jsonl"
    rows = [{"a": "é\u2028\n", "b": [1.5, None]}, {"a": ""}]
    storage.write_jsonl_atomic(path, rows)
    assert storage.read_jsonl(path) == rows
    for bad, error in ((math.nan, ValueError), (math.inf, ValueError), ({1}, TypeError)):
        with pytest.raises(error):
            storage.write_jsonl_atomic(path, [{"a": 1}, {"a": bad}])
        with pytest.raises(error):
            storage.write_json_atomic(path, bad)
    assert storage.read_jsonl(path) == rows
    storage.write_json_atomic(tmp_path / "x.json", {"a": [1]})
    assert storage.read_json(tmp_path / "x.json") == {"a": [1]}
    names = [storage.checksum_path(path).name, path.name]
    assert sorted(p.name for p in path.parent.iterdir()) == names


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "part-00000.jsonl"
    storage.write_jsonl_atomic(path, [{"a": 1}])

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.write_jsonl_atomic(path, [{"a": 2}])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # and no checksum of the new rows
    assert storage.read_jsonl(path) == [{"a": 1}]
    monkeypatch.undo()
    storage.write_jsonl_atomic(path, [{"a": 3}])
    assert storage.read_jsonl(path) == [{"a": 3}]
    path.write_text('{"a": 4}\n')
    with pytest.raises(DataError, match=r"part-00000\.jsonl: .*SHA-256 differs"):
        storage.read_jsonl(path)


def test_reading_errors_name_the_place(tmp_path):
    path = storage.part_path(tmp_path, 0)
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"part-00000\.jsonl:2: not valid JSON"):
        storage.read_jsonl(path)
    with pytest.raises(DataError, match=r"x\.json"):
        storage.read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match="no parts"):
        storage.read_parts(tmp_path / "nothing")
    storage.write_jsonl_atomic(path, [{"a": 0}])
    storage.write_jsonl_atomic(storage.part_path(tmp_path, 2), [{"a": 2}])
    with pytest.raises(DataError, match="2 of 3"):
        storage.read_parts(tmp_path)
    storage.write_jsonl_atomic(storage.part_path(tmp_path, 1), [{"a": 1}])
    assert [row["a"] for row in storage.read_parts(tmp_path)] == [0, 1, 2]


def test_parts_are_ordered_by_number(tmp_path):
    for i in (99_999, 100_000):
        assert storage.part_path(tmp_path, i).name == f"part-{i}.jsonl"
    for i in range(3):
        storage.write_jsonl_atomic(storage.part_path(tmp_path, i), [{"a": i}])
    (tmp_path / ".part-00003.jsonl.1234.tmp").write_text("{")
    (tmp_path / "part-00003.jsonl.tmp").write_text("{")
    assert [row["a"] for row in storage.read_parts(tmp_path)] == [0, 1, 2]


class Killed(BaseException):
    """As KeyboardInterrupt, which no block takes for an error of its own."""


def write_directory(path, text):
    with storage.atomic_directory(path) as scratch:
        (scratch / "weights").write_text(text)
        (scratch / f"shard-{text}").write_text(text)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(Path, "rename", 1), (Path, "rename", 2), (Path, "rename", 3), (storage.shutil, "rmtree", 2)],
)
def test_a_folder_is_replaced_whole_and_what_lies_beside_stays(
    tmp_path, monkeypatch, owner, name, count
):
    """Killed at each rename, and where the old folder is removed."""
    path, real, calls = tmp_path / "policy", getattr(owner, name), []
    write_directory(path, "1")
    for card in ("README.md", "more/notes.txt"):
        (path / card).parent.mkdir(exist_ok=True)
        (path / card).write_text("edited")

    def deadly(*args, **options):
        calls.append(args)
        if len(calls) == count:
            if name == "rmtree":  # in the middle of it
                (args[0] / storage.SUMS).unlink()
            raise Killed
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            write_directory(path, "2")
    storage.settle_directory(path)
    told = (path / "weights").read_text()
    storage.check_directory(path)
    assert told in "12" and (path / f"shard-{told}").is_file()
    write_directory(path, "3")
    storage.check_directory(path)
    files = {x.relative_to(path).as_posix() for x in path.rglob("*") if x.is_file()}
    assert files == {"weights", "shard-3", "README.md", "more/notes.txt", storage.SUMS}
    assert [x.name for x in tmp_path.iterdir()] == ["policy"]
