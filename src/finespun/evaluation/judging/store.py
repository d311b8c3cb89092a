"""The file of a study: SQLite, with the study as it was made and events that are only ever added.

An answer is on disk before anybody hears that it was taken. It names the item's position among its annotator's tasks
and the attempt (how often that item's answer was taken back before); the database takes one answer for each, whoever
sends it and however often: a double click, a second tab, a form that a browser sends again after the server was killed.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from finespun.errors import DataError, RecipeError
from finespun.evaluation.judging.answers import Answer
from finespun.evaluation.judging.settings import StudySettings
from finespun.evaluation.judging.study import Study, create_study
from finespun.files import replacing

EventKind = Literal["start", "answer", "undo"]

BEFORE_ALL = -1
"""The position of what is about no task: that an annotator has read the instructions."""

SCHEMA = """
CREATE TABLE study (version INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    annotator INTEGER NOT NULL,
    position INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('start', 'answer', 'undo')),
    body TEXT NOT NULL,
    UNIQUE (annotator, position, attempt, kind)
);
CREATE TRIGGER no_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
CREATE TRIGGER no_removal BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
CREATE TRIGGER one_study BEFORE UPDATE ON study BEGIN SELECT RAISE(ABORT, 'a study never changes'); END;
"""

VERSION = 1

_STUDY = TypeAdapter(Study)
_ANSWER = TypeAdapter(Answer)


@dataclass(frozen=True)
class Event:
    """What happened. Their order is that of `id`; `at`, the server's clock, is only told to people."""

    id: int
    at: str
    annotator: int
    position: int
    attempt: int
    kind: EventKind
    answer: Answer | None


@dataclass(frozen=True)
class Progress:
    """Where an annotator is. `answers` are those that stand, by position, in the order in which they were given;
    `attempts` counts how often each position's answer was taken back; `next` is the position to judge now."""

    started: bool
    answers: dict[int, Answer]
    undone: dict[int, Answer]
    attempts: Counter[int]
    next: int | None

    @property
    def last(self) -> int | None:
        """The position that was answered last."""
        return next(reversed(self.answers), None)


def progress(events: Iterable[Event], tasks: int) -> Progress:
    """What the events of one annotator with so many tasks come to."""
    started = False
    answers: dict[int, Answer] = {}
    undone: dict[int, Answer] = {}
    attempts: Counter[int] = Counter()
    for event in events:
        if event.kind == "start":
            started = True
        elif event.kind == "undo":
            attempts[event.position] += 1
            if taken_back := answers.pop(event.position, None):
                undone[event.position] = taken_back
        elif event.answer:
            answers[event.position] = event.answer
    open_position = next((position for position in range(tasks) if position not in answers), None)
    return Progress(started, answers, undone, attempts, open_position)


class Store:
    """An open study. Its methods may be called from several threads; several processes may have the same file open."""

    def __init__(self, file: Path, connection: sqlite3.Connection, study: Study) -> None:
        self.file = file
        self.study = study
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def create(cls, file: Path, study: Study) -> Store:
        """A new file with `study` in it, whole or not at all. Raises `DataError` where there is a file already,
        `RunError` where the disk does not take it."""
        if file.exists():
            raise DataError(f"{file}: is there already.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.touch(mode=0o600)  # its links are secrets
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.executescript(SCHEMA)
                connection.execute("INSERT INTO study VALUES (?, ?)", (VERSION, _STUDY.dump_json(study).decode()))
        return cls.open(file)

    @classmethod
    def open(cls, file: Path) -> Store:
        """The study in `file`. Raises `DataError` where there is none that can be read."""
        if not is_study(file):
            raise DataError(f"{file}: is not the file of a study; `finespun judge` makes one.")
        try:
            connection = _connect(file)
            version, body = connection.execute("SELECT version, body FROM study").fetchone()
            if version != VERSION:
                raise DataError(f"{file}: was made by another version of finespun; use that one.")
            return cls(file, connection, _STUDY.validate_json(body))
        except (sqlite3.Error, TypeError, ValidationError) as error:
            raise DataError(
                f"{file}: is damaged, or was changed by something else than finespun ({str(error).splitlines()[0]}). "
                "Take a copy from before that."
            ) from None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def events(self, annotator: int | None = None) -> list[Event]:
        """All that happened, or what one annotator did, oldest first. Raises `DataError` where it cannot be read."""
        with self._lock:
            return self._events(annotator)

    def progress(self, annotator: int) -> Progress:
        """Where an annotator is."""
        with self._lock:
            return self._progress(annotator)

    def last_event(self) -> int:
        """The number of the newest event, which changes with every one; 0 before the first."""
        with self._lock:
            return self._connection.execute("SELECT COALESCE(MAX(id), 0) FROM events").fetchone()[0]

    def start(self, annotator: int) -> None:
        """The annotator has read the instructions."""
        self._add(annotator, BEFORE_ALL, 0, "start", lambda now: True)

    def answer(self, annotator: int, position: int, attempt: int, answer: Answer) -> bool:
        """Stores the answer to the task at `position` if it is the one to judge now, and whether it was so. When this
        returns True, the answer is on disk."""
        body = _ANSWER.dump_json(answer).decode()
        return self._add(
            annotator,
            position,
            attempt,
            "answer",
            lambda now: now.next == position and now.attempts[position] == attempt,
            body,
        )

    def undo(self, annotator: int, position: int, attempt: int) -> bool:
        """Takes back the answer to the task at `position` if it is the one that was given last, and whether it was
        so."""
        return self._add(
            annotator,
            position,
            attempt,
            "undo",
            lambda now: now.last == position and now.attempts[position] == attempt,
        )

    def _add(
        self,
        annotator: int,
        position: int,
        attempt: int,
        kind: EventKind,
        fits: Callable[[Progress], bool],
        body: str = "",
    ) -> bool:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")  # nobody else writes between the look and the leap
            try:
                added = fits(self._progress(annotator)) and bool(
                    self._connection.execute(
                        "INSERT INTO events (at, annotator, position, attempt, kind, body) VALUES (?, ?, ?, ?, ?, ?) "
                        "ON CONFLICT DO NOTHING",
                        (at, annotator, position, attempt, kind, body),
                    ).rowcount
                )
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
        return added

    def _progress(self, annotator: int) -> Progress:
        return progress(self._events(annotator), len(self.study.annotators[annotator].tasks))

    def _events(self, annotator: int | None) -> list[Event]:
        which = "" if annotator is None else "WHERE annotator = ?"
        rows = self._connection.execute(
            f"SELECT id, at, annotator, position, attempt, kind, body FROM events {which} ORDER BY id",
            () if annotator is None else (annotator,),
        ).fetchall()
        events = []
        for *fields, body in rows:
            try:
                answer = _ANSWER.validate_json(body) if body else None
            except ValidationError:
                raise DataError(
                    f"{self.file}, event {fields[0]}: is not an answer that finespun wrote; the file was changed by "
                    "something else. Take a copy from before that."
                ) from None
            events.append(Event(*fields, answer))
        return events


def open_study(outputs: Sequence[str], file: Path, settings: StudySettings) -> Store:
    """The study in the file that `outputs` names alone; else the one in `file`, made of `outputs` where there is none.
    Raises `RecipeError` where another is in `file`, and as `create_study` and `Store.open` do."""
    if len(outputs) == 1 and is_study(Path(outputs[0])):
        return Store.open(Path(outputs[0]))
    made = create_study(outputs, settings)
    if not file.exists():
        return Store.create(file, made)
    store = Store.open(file)
    if difference := store.study.differs_from(made):
        raise RecipeError(
            f"{file} has another study: {difference}. Go on with it (finespun judge {file}), or begin a new one with "
            "--study FILE."
        )
    return store


def is_study(file: Path) -> bool:
    """Whether `file` may be the file of a study: an SQLite database."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return opened.read(16) == b"SQLite format 3\0"
    return False


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # in WAL mode the default is not on disk at a commit
    return connection
