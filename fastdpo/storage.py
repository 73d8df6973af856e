"""Files of a round: whole or absent, whenever the process is killed.

A stage writes a directory of *parts*, `part-00000.jsonl`, `part-00001.jsonl`, ..., beside a
`plan.json` that tells what they are parts of. Every file is written under a temporary name,
flushed to the disk and renamed. A stage that starts again skips the parts that are there.

Rows lie beside their SHA-256, in the format of `sha256sum`, which is compared when they are read. A
folder of weights has the SHA-256 of its files in it (`atomic_directory`).
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdpo.errors import DataError

CACHE = "~/.cache/fastdpo"  # what is kept for other runs; `cache_path` makes it a path
_PLAN = "plan.json"
SUMS = "SHA256SUMS"  # of a folder, in it
_FULL = (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of an OSError
_PART_NAME = re.compile(r"part-(\d{5,})\.jsonl")


def cache_path(path: str) -> Path:
    """A path with ``~/.cache`` as the XDG Base Directory Specification has it: `XDG_CACHE_HOME`
    where that is set to an absolute path."""
    home, own = "~/.cache/", os.environ.get("XDG_CACHE_HOME", "")
    if path.startswith(home) and os.path.isabs(own):
        return Path(own, path.removeprefix(home))
    return Path(path).expanduser()


def write_jsonl_atomic(
    path: Path, rows: Iterable[dict[str, Any]], *, checksum: bool = True
) -> None:
    """Write one JSON object per line, all or nothing; replaces the file and makes its directory.

    Its checksum goes first, so new rows are never there without one; where rows are replaced it
    goes last, so the old ones are never taken for damaged. A file that is to grow has none.

    Raises ValueError when a number is NaN or infinite, and TypeError for what isn't JSON.
    """
    _write(Path(path), "".join(_dump(row) + "\n" for row in rows), checksum)


def write_json_atomic(path: Path, value: Any, *, checksum: bool = False) -> None:
    """Write one JSON value, indented. Otherwise as `write_jsonl_atomic`."""
    _write(Path(path), _dump(value, indent=2) + "\n", checksum)


def _write(path: Path, text: str, checksum: bool) -> None:
    files = [(path, text)]
    if checksum:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        files.insert(0, (checksum_path(path), f"{digest}  {path.name}\n"))
        if path.exists():
            checksum_path(path).unlink(missing_ok=True)
            files.reverse()
    for file, content in files:
        with atomic_file(file) as scratch:
            scratch.write_bytes(content.encode("utf-8"))


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file of rows lies."""
    return Path(path).with_name(f".{Path(path).name}.sha256")


def check_rows(path: Path) -> None:
    """Compare a file with its checksum, if it has one.

    Raises DataError, naming the file, when they differ.
    """
    path, known = Path(path), checksum_path(path)
    if not (known.is_file() and path.is_file()):
        return
    if known.read_text().split()[:1] != [file_digest(path)]:
        raise DataError(
            f"{path}: the content is not what was written (SHA-256 differs): it was damaged or "
            "edited. Delete it, and the same command makes it again; or if the change is meant, "
            f"delete {known.name} beside it."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; the system gives it up when the process ends, however it does.

    Raises DataError when another process has it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / ".lock"), folder / ".lock.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text().strip() if owner.is_file() else "another process"
        raise DataError(
            f"{folder} is in use by {who}. Wait for it, stop it, or name another output_dir."
        ) from error
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file.

    Raises DataError, naming file and line, when a line isn't a JSON object, and naming the file
    when it is missing, empty or not what was written.
    """
    check_rows(path)
    return [row for _, row in json_lines(read_text(path, path), path)]


def read_text(path: Path, name: Path | str) -> str:
    """The text of a file of rows; errors call the file `name`.

    Raises DataError when it is missing, unreadable, empty, or not UTF-8, with the line.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file or directory. Check the path.") from error
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror}). Check permissions.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8. Save the file with UTF-8 encoding.") from error
    if not text.strip():
        raise DataError(f"{name}: the file is empty. Write one object per row.")
    return text


def json_lines(text: str, name: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a text of one a line, and the line of each, from 1.

    Raises DataError, naming file and line, for what isn't one.
    """
    # Only "\n" ends a line: str.splitlines also breaks at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number}: not valid JSON ({error}). "
                "Fix or remove the line; at the end of a file it is often cut short."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{name}:{number}: a JSON {type(row).__name__}, not an object. "
                'Write one object per line, {"prompt": ..., ...}.'
            )
        yield number, row


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises DataError, naming the file, when there is none or it differs
    from its checksum, where it has one.
    """
    check_rows(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}). Check the path.") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Write the file again.") from error


def part_path(directory: Path, part: int) -> Path:
    """Where part number `part` (from 0) of a stage lies."""
    return Path(directory) / f"part-{part:05d}.jsonl"


def list_parts(directory: Path) -> list[Path]:
    """The parts of a finished stage, in order.

    Raises DataError when there are none or some are missing.
    """
    directory = Path(directory)
    numbers = _part_numbers(directory)
    plan = read_plan(directory) or {}
    total = plan.get("parts", len(numbers))
    if type(total) is not int:
        raise DataError(f"{directory / _PLAN}: parts is {total!r}. Run the stage again.")
    if not numbers:
        raise DataError(f"{directory}: there are no parts here. Run the stage that writes them.")
    if numbers != list(range(total)):
        raise DataError(
            f"{directory}: parts are missing; there are {len(numbers)} of "
            f"{max(total, numbers[-1] + 1)}. Run the stage that writes them again, it goes on "
            "where it stopped."
        )
    return [part_path(directory, number) for number in numbers]


def read_parts(directory: Path) -> list[dict[str, Any]]:
    """The rows of all parts of a finished stage, in order.

    Raises DataError as `list_parts` and `read_jsonl` do.
    """
    return [row for path in list_parts(directory) for row in read_jsonl(path)]


def begin_stage(directory: Path, plan: dict[str, Any]) -> None:
    """Record what the parts in `directory` are parts of, or check that it is still the same.

    `plan` is JSON and holds whatever decides the content of the parts, so that what one plan left
    unfinished is never completed by another; its entry "parts", where it has one, is their number.

    Raises DataError when `directory` holds parts of another plan or of none.
    """
    path = Path(directory) / _PLAN
    plan = json.loads(_dump(plan))
    if not _part_numbers(directory):
        write_json_atomic(path, plan)
        return
    known = read_plan(directory) or {}
    changed = sorted(key for key in plan.keys() | known.keys() if plan.get(key) != known.get(key))
    if changed:
        raise DataError(
            f"{directory}: the parts here were written with another {' and '.join(changed)}. "
            "Name a new directory, or delete this one to start again."
        )


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The plan that `begin_stage` recorded, None where there is none.

    Raises DataError when it is damaged.
    """
    path = Path(directory) / _PLAN
    if not path.exists():
        return None
    plan = read_json(path)
    if not isinstance(plan, dict):
        raise DataError(f"{path} is not the plan of a stage. Delete {directory} to start again.")
    return plan


def _part_numbers(directory: Path) -> list[int]:
    names = [path.name for path in Path(directory).glob("part-*.jsonl")]
    return sorted(int(match[1]) for name in names if (match := _PART_NAME.fullmatch(name)))


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a scratch name; what the block writes there becomes the file if it ends without error.

    Raises DataError when safetensors can't write it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that two processes never write into one file.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with told_when_full(path):
            yield scratch
        sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` if the block ends without an error; checksums of
    its files go with it.

    A folder that is there is put aside whole, and goes when the new one is in its place. What lies
    in it beside the files of its checksums, as a card, is of others and stays.

    Raises DataError when safetensors can't write a file of it.
    """
    scratch = begin_directory(path)
    with told_when_full(path):
        yield scratch
    finish_directory(path, digests(scratch, (x for x in scratch.rglob("*") if x.is_file())))


def begin_directory(path: Path) -> Path:
    """The first part of `atomic_directory`: the scratch folder, empty."""
    path = Path(path)
    settle_directory(path)
    scratch = scratch_directory(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def scratch_directory(path: Path) -> Path:
    """Where a folder lies until it is whole."""
    return Path(path).with_name(f".{Path(path).name}.partial")


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their names in a folder."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def finish_directory(path: Path, sums: Mapping[str, str]) -> None:
    """The last part of `atomic_directory`: the scratch folder takes its place, with these
    checksums."""
    path = Path(path)
    scratch = scratch_directory(path)
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums, key=Path)]
    (scratch / SUMS).write_text("".join(lines))
    for file in scratch.rglob("*"):
        sync(file)
    sync(scratch)
    if path.exists():
        path.rename(_aside(path))
    scratch.rename(path)
    sync(path.parent)
    settle_directory(path)


def settle_directory(path: Path) -> None:
    """End what a kill in `atomic_directory` left: where the new folder is not in its place, the old
    one is put back; where it is, the old one goes."""
    path, old = Path(path), _aside(Path(path))
    if not old.is_dir():
        return
    if not path.exists():
        old.rename(path)
        sync(path.parent)
        return
    for file in _of_others(old):
        place = path / file.relative_to(old)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    shutil.rmtree(old)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _of_others(path: Path) -> list[Path]:
    """The files of a folder that are not in its checksums; none where it has no checksums."""
    if not (path / SUMS).is_file():
        return []
    lines = (path / SUMS).read_text().splitlines()
    own = {path / line.partition("  ")[2] for line in lines} | {path / SUMS}
    return [file for file in path.rglob("*") if file.is_file() and file not in own]


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """Make of what a full disk or quota raises, or safetensors, a DataError with the path.

    An `OSError` without a number is taken for one too: not all who write keep it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        if getattr(error, "errno", None) not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free / 2**30
        raise DataError(
            f"{path} can't be written ({error}; {free:.1f} GiB are free on its disk). Make room, "
            "and the same command goes on."
        ) from error


def check_directory(path: Path, share: int = 0, shares: int = 1) -> None:
    """Compare the files of a folder with their checksums; a folder without any is left alone.

    One of several processes can take its share of them.

    Raises DataError when a file is missing or differs.
    """
    path = Path(path)
    if not (path / SUMS).is_file():
        return
    for line in (path / SUMS).read_text().splitlines()[share::shares]:
        wanted, _, name = line.partition("  ")
        file = path / name
        if not file.is_file() or file_digest(file) != wanted:
            what = "differs from what was written" if file.is_file() else "is missing"
            raise DataError(
                f"{file} {what}: the folder is damaged. Delete {path}, and the same command makes "
                "it again."
            )


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name != "posix" and path.is_dir():  # directories can't be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
