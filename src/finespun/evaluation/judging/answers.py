"""What an annotator says about an item, as it is stored, and how it is read from a form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from finespun.evaluation.judging.design import Task
from finespun.evaluation.judging.study import Study

Choice = Literal["first", "second", "tie", "bad"]

LONGEST_COMMENT = 4000
MOST_SPANS = 200


class BadAnswer(Exception):
    """A form that says nothing that can be stored; the page that finespun gives out sends none."""


@dataclass(frozen=True)
class Span:
    """A marked error: characters (Unicode code points) from `start` to before `end` of the text at `place`."""

    place: int
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """One answer; places are those at which the texts stood. `choice` is of pairs, `ranking` (places, the best first)
    of a ranking, `marks` (by criterion, from 1) of a rating. `seconds` is how long the page was looked at, by the
    page's own monotonic clock."""

    choice: Choice | None = None
    ranking: tuple[int, ...] | None = None
    marks: dict[str, int] | None = None
    comment: str = ""
    spans: tuple[Span, ...] = ()
    seconds: float | None = None

    @property
    def said(self) -> tuple[Any, ...]:
        """The judgement alone."""
        return self.choice, self.ranking, self.marks


_SPANS = TypeAdapter(tuple[Span, ...])


def read_answer(form: Mapping[str, str], study: Study, task: Task) -> Answer:
    """The answer in the fields of a form. Raises `BadAnswer` where it does not fit the task."""
    places = len(task.order)
    choice: Choice | None = None
    ranking: tuple[int, ...] | None = None
    marks: dict[str, int] | None = None
    match study.method:
        case "pairs":
            choice = next((known for known in ("first", "second", "tie", "bad") if form.get("choice") == known), None)
            if choice is None:
                raise BadAnswer
        case "ranking":
            ranking = tuple(_whole(place, places - 1) for place in form.get("ranking", "").split(","))
            if sorted(ranking) != list(range(places)):
                raise BadAnswer
        case "rating":
            marks = {one.name: _whole(form.get(f"mark-{one.name}", ""), len(one.points)) for one in study.criteria}
            if 0 in marks.values():
                raise BadAnswer
    return Answer(
        choice,
        ranking,
        marks,
        form.get("comment", "").replace("\r\n", "\n").strip()[:LONGEST_COMMENT],
        _read_spans(form.get("spans", ""), study, task),
        _read_seconds(form.get("seconds", "")),
    )


def _whole(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= most):
        raise BadAnswer
    return int(text)


def _read_spans(text: str, study: Study, task: Task) -> tuple[Span, ...]:
    try:
        spans = _SPANS.validate_json(text or "[]", strict=True)
    except ValidationError:
        raise BadAnswer from None
    candidates = study.items[task.item].candidates
    for span in spans:
        if not (
            0 <= span.place < len(task.order)
            and 0 <= span.start < span.end <= len(candidates[task.order[span.place]].text)
        ):
            raise BadAnswer
    return spans[:MOST_SPANS]


def _read_seconds(text: str) -> float | None:
    try:
        seconds = float(json.loads(text or "null"))
    except (ValueError, TypeError):
        return None
    return round(seconds, 2) if math.isfinite(seconds) and 0 <= seconds < 1e6 else None
