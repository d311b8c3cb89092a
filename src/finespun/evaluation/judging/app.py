"""The pages of a study: an annotator's, which know nothing of models, and the one with the results.

Pages are plain HTML from templates, and an answer is one form. What shows the next item is the answer to the request
that stored the last one, so nothing depends on a connection that stays.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from finespun.evaluation.judging.analysis import passes
from finespun.evaluation.judging.answers import BadAnswer, read_answer
from finespun.evaluation.judging.design import Task
from finespun.evaluation.judging.report import PAGES, LiveResults
from finespun.evaluation.judging.store import Progress, Store
from finespun.evaluation.judging.study import Item
from finespun.evaluation.judging.words import NAMES, WORDS, Language, preferred, told
from finespun.files import hash_of
from finespun.reports.page import environment

LARGEST_FORM = 1_000_000
"""Bytes."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",  # a page behind the back button would show an item that is answered
    "Referrer-Policy": "no-referrer",  # addresses are secrets
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}


def create_app(store: Store, url: str | None = None) -> FastAPI:
    """The application for the study in `store`; links begin with `url`, or with the address at which the page with the
    results is opened."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pages = Pages(store, url)
    app.get("/a/{token}")(pages.show)
    app.get("/a/{token}/language/{code}")(pages.choose_language)
    app.post("/a/{token}/start")(pages.start)
    app.post("/a/{token}/answer")(pages.answer)
    app.post("/a/{token}/undo")(pages.undo)
    app.get("/results/{token}")(pages.results)
    app.get("/assets/{version}/{name}")(pages.asset)
    app.add_exception_handler(HTTPException, pages.missing)
    app.middleware("http")(_add_headers)
    return app


async def _add_headers(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await go_on(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_FORM:
            raise HTTPException(413)
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=200)
    return {name: values[-1] for name, values in fields.items()}


Form = Annotated[dict[str, str], Depends(_form)]


class Pages:
    """The handlers. They run in threads: the store is a file."""

    def __init__(self, store: Store, url: str | None) -> None:
        self._store = store
        self._study = store.study
        self._url = url
        self._live = LiveResults(store)
        self._environment = environment(PAGES)
        self._assets = {
            "style.css": (self._style(), "text/css"),
            **{
                name: ((PAGES / name).read_text(encoding="utf-8"), "text/javascript")
                for name in ("judge.js", "results.js")
            },
        }

        self._assets_at = f"/assets/{hash_of(self._assets)}"

    def show(self, token: str, request: Request, already: bool = False) -> Response:
        """The item to judge now; before the first the instructions, after the last thanks."""
        annotator = self._annotator(token)
        now = self._store.progress(annotator)
        tasks = self._study.annotators[annotator].tasks
        view: dict[str, Any] = {"here": f"/a/{token}", "notice": "", "feedback": None, "undo": None}
        language = self._language(request)
        if tasks and not now.started:
            return self._page("welcome.html.j2", language, **view)
        if now.last is not None:
            view["undo"] = {"position": now.last, "attempt": now.attempts[now.last]}
        words = WORDS[language]
        if already:
            view["notice"] = words["already"]
        elif now.next in now.undone:
            view["notice"] = words["changed"]
        else:
            view["feedback"] = self._feedback(tasks, now, language)
        if now.next is None:
            return self._page("done.html.j2", language, **view)
        return self._page("item.html.j2", language, **view, **self._item(tasks, now.next, now, language))

    def start(self, token: str, request: Request) -> Response:
        """The instructions were read."""
        self._store.start(self._annotator(token))
        return _go(request, f"/a/{token}")

    def answer(self, token: str, request: Request, form: Form) -> Response:
        """Stores an answer, then sends for the next item. One that comes a second time changes nothing."""
        annotator = self._annotator(token)
        position, attempt = _number(form, "position"), _number(form, "attempt")
        tasks = self._study.annotators[annotator].tasks
        if position >= len(tasks):
            raise HTTPException(400)
        try:
            answer = read_answer(form, self._study, tasks[position])
        except BadAnswer:
            raise HTTPException(400) from None
        if self._store.answer(annotator, position, attempt, answer):
            return _go(request, f"/a/{token}")
        standing = self._store.progress(annotator).answers.get(position)
        same = standing is not None and standing.said == answer.said
        return _go(request, f"/a/{token}" + ("" if same else "?already=true"))

    def undo(self, token: str, request: Request, form: Form) -> Response:
        """Takes back the last answer, then shows its item again."""
        self._store.undo(self._annotator(token), _number(form, "position"), _number(form, "attempt"))
        return _go(request, f"/a/{token}")

    def choose_language(self, token: str, code: str) -> Response:
        """Keeps the language in a cookie."""
        self._annotator(token)
        response = RedirectResponse(f"/a/{token}", 303)
        if code in NAMES:
            response.set_cookie("language", code, max_age=365 * 24 * 3600, httponly=True, samesite="lax")
        return response

    def results(self, token: str, request: Request) -> Response:
        """Links and results, for whoever runs the study."""
        if not secrets.compare_digest(token.encode(), self._study.admin.encode()):
            raise HTTPException(404)
        base = (self._url or str(request.base_url)).rstrip("/")
        view = self._live.view(base) | {"assets": self._assets_at}
        return HTMLResponse(self._environment.get_template("live.html.j2").render(view))

    def asset(self, name: str) -> Response:
        """A style sheet or a script. Its address changes with it, so that a browser need ask only once."""
        if name not in self._assets:
            raise HTTPException(404)
        content, kind = self._assets[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})

    def missing(self, request: Request, error: Any) -> Response:
        """For a link that is not whole, and all else that is not there."""
        return self._page("missing.html.j2", self._language(request), status=error.status_code, here=None)

    def _annotator(self, token: str) -> int:
        annotator = self._study.annotator_of(token)
        if annotator is None:
            raise HTTPException(404)
        return annotator

    def _language(self, request: Request) -> Language:
        chosen = request.cookies.get("language")
        return next((code for code in NAMES if code == chosen), preferred(request.headers.get("accept-language", "")))

    def _page(self, template: str, language: Language, status: int = 200, **view: Any) -> HTMLResponse:
        common = {
            "language": language,
            "languages": NAMES,
            "words": WORDS[language],
            "assets": self._assets_at,
            "method": self._study.method,
            "instructions": self._study.instructions,
        }
        return HTMLResponse(self._environment.get_template(template).render(common | view), status)

    def _item(self, tasks: tuple[Task, ...], position: int, now: Progress, language: Language) -> dict[str, Any]:
        """What the page of an item shows. It does not say of what kind the item is, but for practice."""
        words, task = WORDS[language], tasks[position]
        item = self._study.items[task.item]
        practice = sum(one.kind == "practice" for one in tasks)
        before = position < practice
        counted = (
            words["practice"].format(position + 1, practice)
            if before
            else words["item"].format(position + 1 - practice, len(tasks) - practice)
        )
        previous = now.undone.get(position)
        return {
            "counted": counted,
            "done": len(now.answers),
            "total": len(tasks),
            "prompt": _turns(item),
            "texts": [item.candidates[which].text for which in task.order],
            "criteria": [
                {
                    "name": one.name,
                    "title": told(one.title, language),
                    "question": told(one.question, language),
                    "points": [told(point, language) for point in one.points],
                }
                for one in self._study.criteria
            ],
            "position": position,
            "attempt": now.attempts[position],
            "previous": json.dumps(asdict(previous)) if previous else None,
        }

    def _feedback(self, tasks: tuple[Task, ...], now: Progress, language: Language) -> dict[str, Any] | None:
        """What is said about the practice item that was answered last."""
        if now.last is None or tasks[now.last].kind != "practice":
            return None
        words, task = WORDS[language], tasks[now.last]
        item = self._study.items[task.item]
        rating = self._study.method == "rating"
        expected = words["practice_rating"] if rating else words["practice_pairs"].format(task.order.index(0) + 1)
        return {
            "right": passes(self._study, task, now.answers[now.last]),
            "expected": expected,
            "why": item.why
            or (words["practice_why_rating" if rating else "practice_why"] if item.known == "made" else ""),
        }

    def _style(self) -> str:
        """finespun's style of pages, with what the judging pages have besides."""
        template = self._environment.get_template("page.html.j2")
        shared = "".join(template.blocks["style"](template.new_context()))
        return shared + (PAGES / "judge.css").read_text(encoding="utf-8")


def _turns(item: Item) -> list[dict[str, str]]:
    if isinstance(item.prompt, str):
        return [{"role": "", "content": item.prompt}] if item.prompt else []
    return [
        {"role": str(turn.get("role", "")), "content": turn["content"]}
        for turn in item.prompt
        if isinstance(turn.get("content"), str)
    ]


def _number(form: Mapping[str, str], name: str) -> int:
    text = form.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise HTTPException(400)
    return int(text)


def _go(request: Request, path: str) -> Response:
    """Sends a browser to a page: the page's script is told where, a plain form is sent there."""
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"next": path})
    return RedirectResponse(path, 303)
