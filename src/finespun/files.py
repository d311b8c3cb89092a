"""Files that are there whole or not at all: written under a temporary name, flushed to disk, renamed; and the cache in
which finespun keeps some."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from finespun.errors import DataError, RunError

CACHE_DAYS = 30
"""What is kept of data and no run has used for so long is deleted."""


def cache_folder() -> Path:
    """finespun's own cache: `FINESPUN_CACHE`, or the user's cache folder of the system."""
    own = os.environ.get("FINESPUN_CACHE")
    return Path(own) if own else user_cache_path("finespun")


def data_cache() -> Path:
    """The part of the cache for what was found out about data: judged rows, token ids, checks, measures before a
    training."""
    return cache_folder() / "data"


def forget_old(cache: Path) -> None:
    """Deletes what is in the folder `cache` and was not used for `CACHE_DAYS`."""
    limit = time.time() - CACHE_DAYS * 24 * 3600
    for entry in cache.iterdir() if cache.is_dir() else ():
        if entry.stat().st_mtime < limit:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def remembered(place: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, which JSON can hold: kept in the file `place` of the cache and read from there later."""
    if not place.is_file():
        made = make()
        place.parent.mkdir(parents=True, exist_ok=True)
        forget_old(place.parent)
        write_text(place, json.dumps(made))
    place.touch()
    return json.loads(place.read_text(encoding="utf-8"))


def hash_of(parts: Any) -> str:
    """A name for what depends on `parts`, which JSON can hold but for sets and what `str` tells apart."""

    def told(part: Any) -> Any:
        # a set has another order in each process, that of `peft`'s target modules for example
        return sorted(part) if isinstance(part, set | frozenset) else str(part)

    return hashlib.sha256(json.dumps(parts, default=told, sort_keys=True).encode()).hexdigest()[:32]


def seed_of(parts: Any) -> int:
    """A seed that depends on `parts` as `hash_of` does. It has 32 bits, for of a longer one torch's generator on a CPU
    takes only so many."""
    return int(hash_of(parts)[:8], 16)


def read_text(path: Path) -> str:
    """The text (UTF-8) that a person named. Raises `DataError` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text.") from None


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a file with `text` (UTF-8). Raises `RunError` where the disk does not take it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON. Raises as `write_text` does, and `ValueError` for infinity and NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Replaces `path` by `rows` as JSON, one a line. Raises as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def copy_file(source: Path, path: Path) -> None:
    """Replaces `path` by a copy of `source`. Raises `RunError` where the disk does not take it."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary file to write, which then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(_explain(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A temporary folder to fill, which becomes `path` (replacing a folder there) when the block ends well, and
    vanishes when it does not. Raises `RunError` where the disk does not take it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync_folder(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunError(_explain(path, error)) from error
        raise


def append_line(path: Path, line: str) -> None:
    """Adds one line to `path` and flushes it to the system, so that a killed process loses at most its last line."""
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
    except OSError as error:
        raise RunError(_explain(path, error)) from error


def read_appended(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and JSON value of each line that was added to `path`, if it is there. One that a kill tore is passed over,
    and what is added next does not go on in it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and not text.endswith("\n"):
        append_line(path, "")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        yield number, value


def _explain(path: Path, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    free = ""
    with contextlib.suppress(OSError):
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = f" ({shutil.disk_usage(parent).free / 1e9:.1f} GB are free there)"
    return f"{path}: could not be written: {reason}{free}. What was saved before is still valid; make room and go on."


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    # Only POSIX can flush a folder's own entry; elsewhere the rename has to do.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
