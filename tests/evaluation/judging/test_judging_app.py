"""What annotators see and send."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from studies import MODELS, make_study, place_of

from finespun.evaluation.judging.store import Store

pytest.importorskip("fastapi", reason="the pages are served by fastapi, which is not installed")

from fastapi.testclient import TestClient

from finespun.evaluation.judging.app import create_app


@pytest.fixture
def judged(tmp_path):
    """Makes a client and the store behind it."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            options = {"count": settings.pop("count", 6), "models": settings.pop("models", MODELS[:2])}
            if text := settings.pop("text", None):
                options["text"] = text
            study = make_study(tmp_path / "outputs", **options, **({"annotators": 2} | settings))
            store = Store.create(tmp_path / "s.sqlite", study)
            stack.callback(store.close)
            client = TestClient(create_app(store), follow_redirects=False)
            return client, store, [f"/a/{person.token}" for person in study.annotators]

        yield make


def item_of(page: str) -> tuple[int, int]:
    position = re.search(r'name="position" value="(\d+)"', page[page.index('id="answer"') :])
    attempt = re.search(r'name="attempt" value="(\d+)"', page[page.index('id="answer"') :])
    assert position
    assert attempt
    return int(position[1]), int(attempt[1])


def test_instructions_then_items_then_thanks(judged):
    client, store, (link, _) = judged(practice=1, known=1, repeated=1)
    assert "Begin" in client.get(link).text
    assert client.post(f"{link}/start").headers["location"] == link
    tasks = store.study.annotators[0].tasks
    for position, task in enumerate(tasks):
        page = client.get(link).text
        assert item_of(page) == (position, 0)
        shown = re.findall(r'data-place="\d"[^>]*>([^<]*)</div>', page)
        assert shown == [store.study.items[task.item].candidates[which].text for which in task.order]
        assert ("Practice 1 of 1" if not position else f"Item {position} of {len(tasks) - 1}") in page
        form = {"position": position, "attempt": 0, "choice": "first", "seconds": "2.5"}
        assert client.post(f"{link}/answer", data=form).status_code == 303
    assert "Thank you" in client.get(link).text
    assert {answer.seconds for answer in store.progress(0).answers.values()} == {2.5}
    assert store.progress(1).answers == {}


def test_nothing_that_annotators_get_names_a_model(judged):
    client, store, (link, _) = judged(models=MODELS)
    client.post(f"{link}/start")
    assets = re.findall(r'"(/assets/\w+)/\w+\.(?:css|js)"', client.get(link).text)
    assert len(assets) == 2
    got = [client.get(f"{assets[0]}/{name}") for name in ("style.css", "judge.js", "results.js")]
    assert [response.status_code for response in got] == [200] * 3
    got.append(client.get("/a/wrong"))
    for position in range(len(store.study.annotators[0].tasks)):
        got.append(client.get(link))
        got.append(client.post(f"{link}/answer", data={"position": position, "attempt": 0, "choice": "tie"}))
        got.append(client.get(link, headers={"accept-language": "zh"}))
    for response in got:
        everything = response.text + str(response.headers) + str(response.url)
        assert not any(name in everything for name in MODELS)
        assert "test.jsonl" not in everything
    # nor what an item is for, beyond practice
    bodies = " ".join(response.text for response in got)
    assert not re.search(r"known|repeated", bodies.replace("test.jsonl", ""), re.IGNORECASE)
    admin = client.get(f"/results/{store.study.admin}").text
    assert all(name in admin for name in MODELS)


def test_links_are_secrets(judged):
    client, store, (link, _) = judged()
    for wrong in (
        "/",
        "/a/",
        "/a/0",
        link[:-1],
        f"{link}x",
        "/results/",
        f"/results/{link[3:]}",
        f"/a/{store.study.admin}",
    ):
        assert client.get(wrong).status_code == 404
    assert client.post("/a/0/answer", data={"position": 0, "attempt": 0, "choice": "first"}).status_code == 404
    page = client.get(link)
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "<script>" not in page.text


def test_what_comes_twice_counts_once(judged):
    client, store, (link, other) = judged()
    client.post(f"{link}/start")
    first = {"position": 0, "attempt": 0, "choice": "first"}
    client.post(f"{link}/answer", data=first)
    again = client.post(f"{link}/answer", data=first)  # sent again after the server was killed
    assert again.headers["location"] == link
    second = client.post(f"{link}/answer", data=first | {"choice": "tie"})  # another tab, another answer
    assert second.headers["location"] == f"{link}?already=true"
    assert "the first one counts" in client.get(f"{link}?already=true").text
    ahead = client.post(f"{link}/answer", data=first | {"position": 3})
    assert ahead.headers["location"].startswith(link)
    assert [event.kind for event in store.events()] == ["start", "answer"]
    assert item_of(client.get(link).text) == (1, 0)
    assert "Begin" in client.get(other).text


def test_a_script_is_told_where_to_go(judged):
    client, _, (link, _) = judged()
    form = {"position": 0, "attempt": 0, "choice": "first"}
    answer = client.post(f"{link}/answer", data=form, headers={"accept": "application/json"})
    assert answer.json() == {"next": link}


def test_undo_shows_what_was_said(judged):
    client, store, (link, _) = judged()
    client.post(f"{link}/start")
    spans = json.dumps([{"place": 0, "start": 0, "end": 3}])
    said = {"position": 0, "attempt": 0, "choice": "tie", "comment": '<b>好</b>\r\n"x"', "spans": spans}
    client.post(f"{link}/answer", data=said)
    undone = client.post(f"{link}/undo", data={"position": 0, "attempt": 0})
    assert undone.headers["location"] == link
    page = client.get(link).text
    assert item_of(page) == (0, 1)
    assert "<b>" not in page
    previous = re.search(r'data-previous="([^"]*)"', page)
    assert previous
    told = json.loads(previous[1].replace("&#34;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert (told["comment"], told["choice"]) == ('<b>好</b>\n"x"', "tie")
    assert told["spans"] == [{"place": 0, "start": 0, "end": 3}]
    assert store.progress(0).answers == {}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"position": "x", "attempt": "0", "choice": "first"},
        {"position": "999", "attempt": "0", "choice": "first"},
        {"position": "0", "attempt": "-1", "choice": "first"},
        {"position": "0", "attempt": "0", "choice": "third"},
        {"position": "0", "attempt": "0", "choice": "first", "spans": "["},
        {"position": "0", "attempt": "0", "choice": "first", "spans": '[{"place": 2, "start": 0, "end": 1}]'},
        {"position": "0", "attempt": "0", "choice": "first", "spans": '[{"place": 0, "start": 0, "end": 9999}]'},
        {"position": "0", "attempt": "0", "choice": "first", "spans": '[{"place": 0, "start": 1, "end": 1}]'},
    ],
)
def test_a_form_that_says_nothing_is_refused(judged, form):
    client, store, (link, _) = judged()
    assert client.post(f"{link}/answer", data=form).status_code == 400
    assert store.events() == []


def test_odd_seconds_and_long_comments_do_not_matter(judged):
    client, store, (link, _) = judged()
    for position, seconds in enumerate(("", "NaN", "-1", "1e99", "[]", "12.345")):
        form = {"position": position, "attempt": 0, "choice": "tie", "seconds": seconds, "comment": "好" * 9000}
        assert client.post(f"{link}/answer", data=form).status_code == 303
    answers = store.progress(0).answers.values()
    assert [answer.seconds for answer in answers] == [None] * 5 + [12.35]
    assert {len(answer.comment) for answer in answers} == {4000}
    assert client.post(f"{link}/answer", content=b"x" * 2_000_000).status_code == 413


def test_ranking_and_rating(judged):
    client, store, (link, _) = judged(method="ranking", models=MODELS, practice=0, known=0)
    for bad in ("", "0,1", "0,1,1", "0,1,3", "a,b,c"):
        assert client.post(f"{link}/answer", data={"position": 0, "attempt": 0, "ranking": bad}).status_code == 400
    client.post(f"{link}/answer", data={"position": 0, "attempt": 0, "ranking": "2,0,1"})
    assert store.progress(0).answers[0].ranking == (2, 0, 1)


def test_marks(judged):
    client, store, (link, _) = judged(method="rating", practice=0)
    client.post(f"{link}/start")
    page = client.get(link, headers={"accept-language": "zh-CN"}).text
    assert page.count('type="radio"') == 20
    assert "完全正确，自然流畅" in page
    marks = {f"mark-{name}": 4 for name in ("fluency", "adequacy", "coherence")}
    form = {"position": 0, "attempt": 0, **marks}
    for bad in ({}, {"mark-style": 0}, {"mark-style": 6}, {"mark-style": "x"}):
        assert client.post(f"{link}/answer", data=form | bad).status_code == 400
    assert client.post(f"{link}/answer", data=form | {"mark-style": 1}).status_code == 303
    assert store.progress(0).answers[0].marks == {"fluency": 4, "adequacy": 4, "coherence": 4, "style": 1}


def test_practice_is_explained(judged):
    client, store, (link, _) = judged(practice=2)
    client.post(f"{link}/start")
    right = place_of(store.study, 0, 0, 0)
    client.post(f"{link}/answer", data={"position": 0, "attempt": 0, "choice": ("first", "second")[right]})
    assert f"That is right.</strong> Text {right + 1} is better." in client.get(link).text
    wrong = 1 - place_of(store.study, 0, 1, 0)
    client.post(f"{link}/answer", data={"position": 1, "attempt": 0, "choice": ("first", "second")[wrong]})
    assert "not what was expected" in client.get(link).text
    client.post(f"{link}/answer", data={"position": 2, "attempt": 0, "choice": "tie"})
    assert 'class="notice' not in client.get(link).text


def test_language_by_browser_and_by_choice(judged):
    client, _, (link, _) = judged()
    page = client.get(link, headers={"accept-language": "zh-CN,zh;q=0.9"}).text
    assert '<html lang="zh">' in page
    assert "开始" in page
    chosen = client.get(f"{link}/language/en", headers={"accept-language": "zh"})
    assert chosen.headers["location"] == link
    assert '<html lang="en">' in client.get(link, headers={"accept-language": "zh"}).text  # the client keeps the cookie
    client.get(f"{link}/language/zh")
    assert '<html lang="zh">' in client.get(link).text


def test_texts_are_shown_and_never_run(judged):
    odd = "<script>alert(1)</script> {{ 7 * 7 }} 春眠不觉晓 👩‍🚀"
    client, _, (link, _) = judged(text=lambda model, row: f"{odd} {model}", practice=0, known=0)
    client.post(f"{link}/start")
    page = client.get(link).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }} 春眠不觉晓 👩‍🚀" in page
    assert "<script>" not in page


def test_own_instructions(judged, tmp_path):
    file = tmp_path / "read.txt"
    file.write_text("请仔细阅读 <all>.\nTwice.", encoding="utf-8")
    client, _, (link, _) = judged(instructions=file)
    assert "请仔细阅读 &lt;all&gt;.\nTwice." in client.get(link).text
