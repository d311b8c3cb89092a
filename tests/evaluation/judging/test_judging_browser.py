"""Two people judge thirty items each through the real page: by keyboard and by touch, with a reload, a killed server
and a phone's window in between."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import MODELS, make_study, write_outputs

from finespun.evaluation.judging.settings import StudySettings
from finespun.evaluation.judging.store import Store
from finespun.evaluation.judging.study import create_study

pytest.importorskip("fastapi", reason="the pages are served by fastapi, which is not installed")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by playwright, which is not installed"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Process:
    """`finespun judge` in a process, which can be killed and started again at the same address."""

    def __init__(self, store: Store) -> None:
        self.study = store.study
        self._file = store.file
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "finespun", "judge", str(self._file), "--port", str(self._port)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        last = f"Annotator {len(self.study.annotators)}:"
        assert any(line.startswith(last) for line in self._process.stdout)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def link(self, annotator: int) -> str:
        return f"http://127.0.0.1:{self._port}/a/{self.study.annotators[annotator].token}"


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[[Store], Process]]:
    with contextlib.ExitStack() as stack:

        def serve(store: Store) -> Process:
            store.close()
            process = Process(store)
            stack.callback(process.kill)
            return process

        yield serve


class Person:
    """Somebody at a page. All that the page gets is looked through for models' names."""

    def __init__(self, browser: Any, link: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.link = link
        self.seen: list[str] = []
        self.leaks: list[str] = []
        self.faults: list[str] = []
        self.open()

    def open(self) -> None:
        self.page = self.context.new_page()
        self.page.on("response", self._look)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(self.link)

    def _look(self, response: Any) -> None:
        told = [response.url, str(response.headers)]
        with contextlib.suppress(sync_api.Error):  # a body that the browser has thrown away already
            told.append(response.text())
        self.seen.append(response.url)
        self.leaks += [text for text in told if any(name in text for name in MODELS)]

    def begin(self) -> None:
        self.page.get_by_role("button", name=re.compile("Begin|开始")).click()
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def position(self) -> int | None:
        """The item that shows, None where all are done."""
        self.ready()
        field = self.page.locator("#answer [name=position]")
        return int(field.input_value()) if field.count() else None

    def done(self, position: int) -> None:
        """Waits until an item no longer shows."""
        self.page.wait_for_function(
            "p => document.documentElement.dataset.ready && "
            "document.querySelector('#answer [name=position]')?.value !== p",
            arg=str(position),
        )

    def texts(self) -> list[str]:
        return self.page.locator(".candidate .text").all_inner_texts()

    def better(self) -> int:
        """Which of two texts somebody prefers who likes the one that is longer when its letters are sorted."""
        first, second = (sorted(text) for text in self.texts())
        return 0 if first >= second else 1


@pytest.mark.slow
def test_two_people_judge_thirty_items_each(browser, serving, tmp_path):
    study = make_study(tmp_path, 24, annotators=2, practice=2, known=2, repeated=2)
    process = serving(Store.create(tmp_path / "study.sqlite", study))
    expected: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}

    keyboard = Person(browser, process.link(0), viewport={"width": 1280, "height": 800}, locale="en-GB")
    keyboard.page.wait_for_selector("button:focus")
    keyboard.page.keyboard.press("Enter")
    touch = Person(browser, process.link(1), **PHONE, locale="zh-CN")
    assert touch.page.locator("html").get_attribute("lang") == "zh"
    touch.begin()

    for turn in range(30):
        for number, person in enumerate((keyboard, touch)):
            if turn == 5 and number == 0:
                person.page.reload()
            if turn == 9 and number == 1:  # on with another device
                person.context.close()
                seen, leaks = person.seen, person.leaks
                touch = person = Person(browser, process.link(1), **PHONE | {"viewport": {"width": 320, "height": 568}})
                person.seen, person.leaks = seen + person.seen, leaks + person.leaks
            if turn == 14 and number == 0:
                person.page.set_viewport_size({"width": 390, "height": 780})
            position = person.position()
            assert position == turn
            texts, better = person.texts(), person.better()
            expected[number].append((*texts, str(better)))
            if turn == 12:  # the server dies before the answer reaches it
                process.kill()
            if number == 0:
                answer_by_key(person, turn, better)
            else:
                person.page.locator(".choice").nth(better).tap()
            if turn == 12:
                person.page.wait_for_selector("#status.waiting")
                process.start()
            person.done(position)
            if turn == 20 and number == 0:  # takes it back, and says it again
                person.page.keyboard.press("u")
                person.page.wait_for_selector(".choice.previous")
                assert person.position() == turn
                person.page.keyboard.press(str(better + 1))
                person.done(position)

    for person in (keyboard, touch):
        assert person.position() is None
        assert person.leaks == []
        assert person.faults == []
        assert len(person.seen) > 60
        assert not any(url.startswith("http") and "127.0.0.1" not in url for url in person.seen)
        person.context.close()
    process.kill()

    store = Store.open(tmp_path / "study.sqlite")
    counts = Counter((event.annotator, event.kind) for event in store.events())
    assert counts == {(0, "start"): 1, (1, "start"): 1, (0, "answer"): 31, (0, "undo"): 1, (1, "answer"): 30}
    for annotator in (0, 1):
        answers = store.progress(annotator).answers
        assert sorted(answers) == list(range(30))
        for position, answer in answers.items():
            task = study.annotators[annotator].tasks[position]
            *texts, better = expected[annotator][position]
            shown = [study.items[task.item].candidates[which].text for which in task.order]
            assert texts == shown
            assert answer.choice == ("first", "second")[int(better)]
            assert answer.seconds is not None
            assert 0 < answer.seconds < 60
    store.close()


def answer_by_key(person: Person, turn: int, better: int) -> None:
    """By digit, or by arrows and Enter."""
    if turn % 3:
        person.page.keyboard.press(str(better + 1))
    else:
        for _ in range(better + 1):
            person.page.keyboard.press("ArrowRight")
        assert person.page.evaluate("document.activeElement.value") == ("first", "second")[better]
        person.page.keyboard.press("Enter")


def test_two_tabs_double_clicks_and_two_people_on_one_link(browser, serving, tmp_path):
    study = make_study(tmp_path, 8, annotators=1, practice=0, known=0, repeated=0)
    process = serving(Store.create(tmp_path / "study.sqlite", study))
    one = Person(browser, process.link(0))
    one.begin()
    two = Person(browser, process.link(0), **PHONE)  # another browser with the same link
    assert (one.position(), two.position()) == (0, 0)
    one.page.locator(".choice").nth(0).dblclick()
    one.done(0)
    assert one.position() == 1  # the second click did not answer the next item
    two.page.locator(".choice").nth(1).tap()
    two.done(0)
    assert two.position() == 1
    assert two.page.get_by_text("the first one counts").is_visible()
    two.page.locator(".choice").nth(2).tap()
    two.done(1)
    one.page.keyboard.press("4")
    one.done(1)
    assert one.position() == 2
    process.kill()
    store = Store.open(tmp_path / "study.sqlite")
    assert [(event.kind, event.position) for event in store.events()] == [("start", -1), ("answer", 0), ("answer", 1)]
    assert [answer.choice for answer in store.progress(0).answers.values()] == ["first", "tie"]
    store.close()


def test_errors_are_marked_by_keyboard_and_by_pointer(browser, serving, tmp_path):
    text = "👩‍🚀 秋风吹落叶，寒雁 past the mill {}."
    study = make_study(
        tmp_path,
        2,
        text=lambda model, row: text.format(10 * row + model),
        annotators=1,
        practice=0,
        known=0,
        repeated=0,
    )
    process = serving(Store.create(tmp_path / "study.sqlite", study))
    person = Person(browser, process.link(0), viewport={"width": 1280, "height": 800})
    person.begin()
    box = person.page.locator(".candidate .text").nth(1)
    to_mill = ("e", "ArrowDown", *["ArrowRight"] * 20, "ArrowLeft", "ArrowLeft")
    keys = (*to_mill, "ArrowLeft", "ArrowLeft", "Enter", "ArrowLeft", "ArrowRight", "Backspace", "Escape")
    for key in (*keys, *to_mill, "Shift+ArrowLeft", "Enter", "Escape"):
        person.page.keyboard.press(key)
    assert box.locator("mark").all_inner_texts() == ["the mill"]
    box.evaluate(
        "box => { const range = document.createRange(); const text = box.firstChild; "
        "const at = text.data.indexOf('吹落叶'); range.setStart(text, at); range.setEnd(text, at + 3); "
        "getSelection().removeAllRanges(); getSelection().addRange(range); }"
    )
    person.page.locator("#mark").click()
    assert box.locator("mark").all_inner_texts() == ["吹落叶", "the mill"]
    person.page.locator(".candidate .text").nth(0).evaluate(
        "box => { const range = document.createRange(); range.setStart(box.firstChild, 0); "
        "range.setEnd(box.firstChild, 7); getSelection().removeAllRanges(); getSelection().addRange(range); }"
    )
    person.page.locator("#mark").click()
    person.page.locator(".candidate .text").nth(0).locator("mark").click()  # and taken away again
    person.page.keyboard.press("c")
    person.page.keyboard.type("1 u 好")  # no keys of the page while one writes
    person.page.keyboard.press("Escape")
    person.page.keyboard.press("1")
    person.done(0)
    process.kill()

    store = Store.open(tmp_path / "study.sqlite")
    (answer,) = store.progress(0).answers.values()
    task = study.annotators[0].tasks[0]
    marked = study.items[task.item].candidates[task.order[1]].text
    assert [marked[span.start : span.end] for span in sorted(answer.spans, key=lambda one: one.start)] == [
        "吹落叶",
        "the mill",
    ]
    assert {span.place for span in answer.spans} == {1}
    assert answer.comment == "1 u 好"
    store.close()


def test_ranking_and_rating_by_keyboard_and_touch(browser, serving, tmp_path):
    sources = write_outputs(tmp_path, 2, MODELS)
    settings = {"annotators": 1, "practice": 0, "known": 0, "repeated": 0}
    ranking = create_study(sources, StudySettings(method="ranking", **settings))
    process = serving(Store.create(tmp_path / "ranking.sqlite", ranking))
    person = Person(browser, process.link(0))
    person.begin()
    person.page.keyboard.press("Enter")  # nothing is ranked yet
    person.page.wait_for_selector("#status.incomplete")
    for key in ("3", "1", "Backspace", "1"):
        person.page.keyboard.press(key)
    assert person.page.locator(".rank output").all_inner_texts() == ["2", "3", "1"]
    person.page.keyboard.press("Enter")
    person.done(0)
    phone = Person(browser, process.link(0), **PHONE)
    for place in (1, 0):
        phone.page.locator(".rank").nth(place).tap()
    phone.ready()
    phone.page.locator("#save").tap()
    phone.done(1)
    person.page.reload()
    assert person.position() is None
    person.page.keyboard.press("u")  # takes the last answer back, which is shown again
    assert person.page.wait_for_selector(".rank.placed")
    assert person.position() == 1
    assert person.page.locator(".rank output").all_inner_texts() == ["2", "1", "3"]
    person.page.locator("#clear").click()
    for key in "321":
        person.page.keyboard.press(key)
    person.page.keyboard.press("Enter")
    person.done(1)
    process.kill()
    store = Store.open(tmp_path / "ranking.sqlite")
    assert [answer.ranking for answer in store.progress(0).answers.values()] == [(2, 0, 1), (2, 1, 0)]
    store.close()

    rating = create_study(sources, StudySettings(method="rating", **settings))
    process = serving(Store.create(tmp_path / "rating.sqlite", rating))
    person = Person(browser, process.link(0))
    person.begin()
    for key in ("5", "4", "3"):
        person.page.keyboard.press(key)
    person.page.keyboard.press("Enter")
    person.page.wait_for_selector("#status.incomplete")
    person.page.keyboard.press("1")
    person.page.keyboard.press("Enter")
    person.done(0)
    phone = Person(browser, process.link(0), **PHONE, locale="zh-CN")
    phone.ready()
    for name in ("fluency", "adequacy", "coherence", "style"):
        phone.page.locator(f"[name=mark-{name}][value='2']").tap()
    phone.page.locator("#save").tap()
    phone.done(1)
    process.kill()
    store = Store.open(tmp_path / "rating.sqlite")
    assert [list((answer.marks or {}).values()) for answer in store.progress(0).answers.values()] == [
        [5, 4, 3, 1],
        [2, 2, 2, 2],
    ]
    store.close()


def test_nothing_is_wider_than_a_phone(browser, serving, tmp_path):
    long = "Donaudampfschifffahrtsgesellschaftskapitän" * 4
    study = make_study(tmp_path, 3, text=lambda model, row: f"{long} {model} {row}", annotators=1, practice=0, known=0)
    process = serving(Store.create(tmp_path / "study.sqlite", study))
    person = Person(browser, process.link(0), **PHONE | {"viewport": {"width": 320, "height": 568}})
    person.begin()
    width = person.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 320
    for button in person.page.locator(".choice").all():
        box = button.bounding_box()
        assert box["height"] >= 44  # as large as a finger
        assert box["y"] + box["height"] <= 568  # in sight without scrolling
