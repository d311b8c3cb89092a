"""Studies to test with: outputs on disk, and answers to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finespun.evaluation.judging.answers import Answer
from finespun.evaluation.judging.settings import StudySettings
from finespun.evaluation.judging.store import Event
from finespun.evaluation.judging.study import Study, create_study

MODELS = ("marmot-tuned", "badger-base", "otter-large")
"""Names that stand in no text, so that they can be looked for."""

SENTENCE = "the old ferryman rowed over a slow river and said nothing at all while herons stood beside the mill"


def text_of(model: int, row: int) -> str:
    """What a model wrote; no two are the same."""
    return " ".join(random.Random(1000 * model + row).sample(SENTENCE.split(), 12)) + f" {model + 3}{row}."


def write_outputs(
    folder: Path, count: int = 12, models: Sequence[str] = MODELS[:2], text: Callable[[int, int], str] = text_of
) -> list[str]:
    """An evaluation folder for each model."""
    for number, model in enumerate(models):
        lines = [
            {
                "index": row,
                "origin": f"test.jsonl, row {row + 1}",
                "prompt": f"Write line {row}.",
                "references": [],
                "output": text(number, row),
                "finish_reason": "stop",
                "output_tokens": 12,
            }
            for row in range(count)
        ]
        (folder / model).mkdir(parents=True, exist_ok=True)
        file = folder / model / "outputs.jsonl"
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return [str(folder / model) for model in models]


def make_study(
    folder: Path,
    count: int = 12,
    models: Sequence[str] = MODELS[:2],
    text: Callable[[int, int], str] = text_of,
    **settings: Any,
) -> Study:
    return create_study(write_outputs(folder, count, models, text), StudySettings(**settings))


def place_of(study: Study, annotator: int, position: int, candidate: int) -> int:
    """Where a candidate stood."""
    return study.annotators[annotator].tasks[position].order.index(candidate)


def prefer(study: Study, annotator: int, position: int, candidate: int) -> Answer:
    """The answer of somebody who prefers a candidate of a pair, wherever it stands."""
    return Answer(choice="second" if place_of(study, annotator, position, candidate) else "first", seconds=3.0)


def answer_all(study: Study, say: Callable[[int, int], Answer]) -> list[Event]:
    """The events of all annotators who give the answer `say(annotator, position)` to each of their tasks."""
    events = []
    for annotator, person in enumerate(study.annotators):
        for position in range(len(person.tasks)):
            said = say(annotator, position)
            events.append(Event(len(events) + 1, "2026-01-01T00:00:00+00:00", annotator, position, 0, "answer", said))
    return events
