"""The file of a study: each answer is on disk before the next item shows, and counts once."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from studies import make_study

from finespun.errors import DataError
from finespun.evaluation.judging.answers import Answer
from finespun.evaluation.judging.store import Store

FIRST = Answer(choice="first")
TIE = Answer(choice="tie", comment="好", seconds=2.5)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(Store.create(tmp_path / "s.sqlite", make_study(tmp_path, annotators=2))) as made:
        yield made


def test_a_study_is_read_back_as_it_was_made(tmp_path):
    study = make_study(tmp_path, method="rating", annotators=3)
    Store.create(tmp_path / "s.sqlite", study).close()
    assert Store.open(tmp_path / "s.sqlite").study == study


def test_an_answer_counts_once(store):
    assert store.answer(0, 0, 0, TIE)
    assert not store.answer(0, 0, 0, TIE)  # a double click
    assert not store.answer(0, 0, 0, FIRST)  # another tab
    assert not store.answer(0, 2, 0, FIRST)  # an item that was not shown yet
    assert store.answer(1, 0, 0, FIRST)  # somebody else
    assert store.progress(0).answers == {0: TIE}
    assert store.progress(0).next == 1
    assert [event.annotator for event in store.events()] == [0, 1]


def test_undo_is_an_event_too(store):
    for position in range(3):
        store.answer(0, position, 0, FIRST)
    assert not store.undo(0, 1, 0)  # only the last one
    assert store.undo(0, 2, 0)
    assert not store.undo(0, 2, 0)  # a double click takes back one
    assert store.progress(0).next == 2
    assert store.progress(0).undone == {2: FIRST}
    assert not store.answer(0, 2, 0, FIRST)  # what was sent before the undo, and arrives after it
    assert not store.answer(0, 2, 2, FIRST)
    assert store.answer(0, 2, 1, TIE)
    assert store.progress(0).answers == {0: FIRST, 1: FIRST, 2: TIE}
    assert store.undo(0, 2, 1)
    assert store.undo(0, 1, 0)
    assert store.progress(0).next == 1
    assert [event.kind for event in store.events()] == ["answer"] * 3 + ["undo", "answer", "undo", "undo"]


def test_events_are_only_added(store):
    store.answer(0, 0, 0, FIRST)
    with contextlib.closing(sqlite3.connect(store.file)) as other:
        for change in ("UPDATE events SET kind = 'undo'", "DELETE FROM events", "UPDATE study SET body = ''"):
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(change)


def test_many_at_once_count_once(store):
    """Two processes' worth of connections, each with threads, all with the same answers."""
    again = Store.open(store.file)
    taken = []

    def work(which: Store) -> None:
        for position in range(8):
            if which.answer(0, position, 0, FIRST):
                taken.append(position)

    threads = [threading.Thread(target=work, args=(which,)) for which in (store, again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again.close()
    assert sorted(taken) == list(range(len(taken)))
    assert len(store.events()) == len(taken) == len(store.progress(0).answers)


WRITER = """
import sys
from pathlib import Path
from finespun.evaluation.judging.answers import Answer
from finespun.evaluation.judging.store import Store

store = Store.open(Path(sys.argv[1]))
position = store.progress(0).next
print("ready", flush=True)
for line in sys.stdin:
    store.answer(0, position, 0, Answer(choice="first", comment=str(position)))
    print(position, flush=True)
    position += 1
"""


def test_a_killed_process_loses_nothing_that_it_said_was_saved(tmp_path):
    store = Store.create(tmp_path / "s.sqlite", make_study(tmp_path, 60))
    store.close()
    expected = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(8):
            process.stdin.write("\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == expected
            expected += 1
        process.stdin.write("\n\n\n")  # under way when it dies
        process.stdin.flush()
        process.kill()
        told = process.communicate()[0].split()
        assert process.returncode == -signal.SIGKILL

        reopened = Store.open(store.file)
        answers = reopened.progress(0).answers
        assert expected + len(told) <= len(answers) <= expected + 3
        assert [answer.comment for answer in answers.values()] == [str(position) for position in range(len(answers))]
        assert len(reopened.events()) == len(answers)
        reopened.close()
        expected = len(answers)


def test_a_file_that_is_none_is_refused(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("no study")
    with pytest.raises(DataError, match="is not the file of a study"):
        Store.open(other)
    with pytest.raises(DataError, match="is not the file of a study"):
        Store.open(tmp_path / "missing.sqlite")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.sqlite")) as database:
        database.execute("CREATE TABLE t (a)")
    with pytest.raises(DataError, match="damaged"):
        Store.open(tmp_path / "other.sqlite")
    with pytest.raises(DataError, match="is there already"):
        Store.create(other, make_study(tmp_path))


def test_an_event_changed_by_hand_is_named(store):
    store.answer(0, 0, 0, FIRST)
    store.answer(0, 1, 0, FIRST)
    with contextlib.closing(sqlite3.connect(store.file)) as other:
        other.execute("DROP TRIGGER no_change")
        other.execute('UPDATE events SET body = \'{"choice": "left"}\' WHERE id = 2')
        other.commit()
    with pytest.raises(DataError, match="event 2: is not an answer that finespun wrote"):
        store.progress(0)


def test_only_its_owner_can_read_the_links(store):
    assert store.file.stat().st_mode & 0o077 == 0
