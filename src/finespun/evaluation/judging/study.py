"""A study: outputs of several models, and how people will judge them. Made once, never changed."""

from __future__ import annotations

import itertools
import json
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from finespun.errors import DataError, RecipeError
from finespun.evaluation.judging.criteria import Criterion, find_criteria
from finespun.evaluation.judging.design import Task, assign, plan, scrambled
from finespun.evaluation.judging.settings import Method, StudySettings
from finespun.evaluation.outputs import Output, read_outputs
from finespun.files import hash_of, read_text

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""

TOKEN_BYTES = 24
"""Of the secret in a link: 192 bits, which nobody finds by trying."""


@dataclass(frozen=True)
class Candidate:
    """One text of an item, and the models (positions in `Study.models`) that wrote exactly it; a control's has none."""

    text: str
    models: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """What is judged at once: a prompt with one text or several. Of an item with a `known` answer, made from a text or
    given by a person, the first candidate is the better one; a rating's, which has one candidate, is bad."""

    example: int
    origin: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    known: Literal["made", "given"] | None = None
    why: str | None = None


@dataclass(frozen=True)
class Annotator:
    """Somebody who judges: the secret in the personal link, and what is judged, in its order."""

    token: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Study:
    """All that is fixed when a study begins. `same_text` has (model, model, examples for which both wrote the same, so
    that nobody is asked)."""

    method: Method
    models: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    instructions: str | None
    items: tuple[Item, ...]
    annotators: tuple[Annotator, ...]
    same_text: tuple[tuple[int, int, int], ...]
    admin: str
    settings: dict[str, Any]
    outputs_hash: str

    def annotator_of(self, token: str) -> int | None:
        """The number, from 0, of the annotator whose link has `token`."""
        # compared in constant time: how long a refusal takes says nothing about the tokens there are
        found = [secrets.compare_digest(one.token.encode(), token.encode()) for one in self.annotators]
        return found.index(True) if True in found else None

    def differs_from(self, other: Study) -> str | None:
        """What is not as in `other`; None where both are made of the same outputs with the same settings."""
        for key, value in self.settings.items():
            if value != other.settings.get(key):
                return f"{key} is {value} there, not {other.settings.get(key)}"
        return None if self.outputs_hash == other.outputs_hash else "it compares other outputs"


def create_study(sources: Sequence[str], settings: StudySettings) -> Study:
    """A new study of the outputs at `sources`: evaluation folders or their `outputs.jsonl`, NAME=PATH for a name of
    one's own. Raises `DataError` where they do not belong together, `RecipeError` for settings that cannot be."""
    names = name_models(sources)
    outputs = [outputs_of(source) for source in sources]
    _check_same_prompts(names, outputs)
    if settings.method != "rating" and len(sources) < 2:
        raise RecipeError(
            "To compare, give the outputs of two models or more; one alone can be rated (--method rating)."
        )
    rng = random.Random(settings.seed)
    count = len(outputs[0])
    drawn = rng.sample(range(count), min(settings.examples or count, count))
    rows = [[_shown(model_outputs[row].text) for model_outputs in outputs] for row in drawn]
    items = [
        item for row, texts in zip(drawn, rows, strict=True) for item in _items(settings.method, outputs[0][row], texts)
    ]
    if not items:
        raise DataError("All models wrote the same texts; there is nothing to compare.")
    unused = [row for row in range(count) if row not in set(drawn)]
    controls = _controls(settings, outputs, [*rng.sample(unused, len(unused)), *drawn], rng)
    return Study(
        settings.method,
        names,
        find_criteria(settings.criteria, settings.criteria_file) if settings.method == "rating" else (),
        read_text(settings.instructions) if settings.instructions else None,
        (*items, *controls),
        _plans(items, controls, settings, rng),
        _same_texts(rows, len(names)),
        secrets.token_urlsafe(TOKEN_BYTES),
        settings.model_dump(mode="json"),
        hash_of([names, [[output.prompt, output.text] for each in outputs for output in each]]),
    )


def outputs_of(source: str) -> list[Output]:
    """The outputs at `source`, an evaluation folder or its `outputs.jsonl`. Raises `DataError` where there are none."""
    _, path = _split_name(source)
    file = path / "outputs.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: has no outputs; `finespun evaluate` writes a folder with outputs.jsonl.")
    outputs = read_outputs(file)
    if not outputs:
        raise DataError(f"{file}: has no outputs in it.")
    return outputs


def name_models(sources: Sequence[str]) -> tuple[str, ...]:
    """A name for each source: the one it is given (NAME=PATH), else as many of the last parts of its path as it takes
    to tell all apart. Raises `RecipeError` where two are the same."""
    given, paths = zip(*map(_split_name, sources), strict=True)
    folders = [path.absolute().parent if path.name == "outputs.jsonl" else path.absolute() for path in paths]
    longest = max(len(folder.parts) for folder in folders)
    names: list[str] = []
    for length in range(1, longest + 1):
        names = [name or "/".join(folder.parts[-length:]) for name, folder in zip(given, folders, strict=True)]
        if len(set(names)) == len(names):
            return tuple(names)
    twice = next(name for name in names if names.count(name) > 1)
    raise RecipeError(f"{twice} is given twice; a model is compared with others.")


def _split_name(source: str) -> tuple[str, Path]:
    """The name and the path in NAME=PATH; no name where `source` is a path, which may have an equals sign in it."""
    name, equals, path = source.partition("=")
    return (name, Path(path)) if equals and not Path(source).exists() else ("", Path(source))


def _check_same_prompts(names: Sequence[str], outputs: Sequence[list[Output]]) -> None:
    for name, theirs in zip(names[1:], outputs[1:], strict=True):
        if len(theirs) != len(outputs[0]):
            raise DataError(
                f"{names[0]} has {len(outputs[0])} outputs, {name} has {len(theirs)}: only outputs for the same "
                "prompts can be compared."
            )
        for first, second in zip(outputs[0], theirs, strict=True):
            if first.prompt != second.prompt:
                raise DataError(
                    f"Example {first.index} has different prompts: {names[0]} was asked {_excerpt(first.prompt)} "
                    f"({first.origin}), {name} {_excerpt(second.prompt)} ({second.origin}). Only outputs for the same "
                    "prompts can be compared."
                )


def _excerpt(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return f"“{text if len(text) <= 60 else text[:60] + '…'}”"


def _shown(text: str) -> str:
    """`text` as a browser has it, where the places of marked errors are counted: its lines end with a line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")


def _items(method: Method, output: Output, texts: Sequence[str]) -> list[Item]:
    """What people are asked about one example. Nobody is asked to compare a text with itself: models that wrote the
    same are judged as one."""
    candidates = [
        Candidate(text, tuple(model for model, other in enumerate(texts) if other == text))
        for text in dict.fromkeys(texts)
    ]
    groups: list[tuple[Candidate, ...]]
    match method:
        case "pairs":
            groups = list(itertools.combinations(candidates, 2))
        case "ranking":
            groups = [tuple(candidates)] if len(candidates) > 1 else []
        case "rating":
            groups = [(candidate,) for candidate in candidates]
    prompt: Any = output.prompt if isinstance(output.prompt, str) else [dict(message) for message in output.prompt]
    return [Item(output.index, output.origin, prompt, group) for group in groups]


def _same_texts(rows: Sequence[Sequence[str]], models: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (a, b, sum(texts[a] == texts[b] for texts in rows)) for a, b in itertools.combinations(range(models), 2)
    )


def _controls(
    settings: StudySettings, outputs: Sequence[list[Output]], rows: Sequence[int], rng: random.Random
) -> list[Item]:
    """Items with a known answer: the person's own, or texts beside themselves out of order, references before outputs
    and examples that are not judged before others."""
    wanted = settings.practice + settings.known
    if settings.known_items:
        found = _read_known(settings.known_items)
    else:
        found = []
        for row in rows:
            if len(found) >= wanted:
                break
            output = outputs[rng.randrange(len(outputs))][row]
            text = _shown(output.references[0] if output.references else output.text)
            if worse := scrambled(text, rng):
                found.append((output.prompt, text, worse, None))
    items = []
    for number, (prompt, better, worse, why) in enumerate(found[:wanted]):
        texts = (worse,) if settings.method == "rating" else (better, worse)
        told: Any = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        candidates = tuple(Candidate(text, ()) for text in texts)
        items.append(Item(number, "known answer", told, candidates, "given" if settings.known_items else "made", why))
    return items


def _read_known(file: Path) -> list[tuple[Any, str, str, str | None]]:
    found = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: is not JSON ({error}).") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("better", "worse")):
            raise DataError(f"{where}: should have the texts `better` and `worse`, and a `prompt`.")
        prompt, why = row.get("prompt", ""), row.get("why")
        messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not isinstance(prompt, str) and not messages:
            raise DataError(f"{where}: `prompt` should be a text or messages.")
        found.append((prompt, _shown(row["better"]), _shown(row["worse"]), str(why) if why else None))
    if not found:
        raise DataError(f"{file}: has no items in it.")
    return found


def _plans(
    items: Sequence[Item], controls: Sequence[Item], settings: StudySettings, rng: random.Random
) -> tuple[Annotator, ...]:
    """Each annotator's tasks. The texts of an example that are rated one at a time go to the same people, so that their
    marks can be compared."""
    together = settings.method == "rating"
    units = [
        [number for number, _ in unit]
        for _, unit in itertools.groupby(enumerate(items), lambda one: one[1].example if together else one[0])
    ]
    models = [tuple(candidate.models for candidate in item.candidates) for item in items]
    assigned = assign(
        [len(unit) for unit in units], [models[unit[0]] for unit in units], settings.annotators, settings.overlap, rng
    )
    shown = [(len(items) + number, len(control.candidates)) for number, control in enumerate(controls)]
    annotators = []
    for own in assigned:
        real = [(number, models[number]) for unit in own for number in units[unit]]
        tasks = plan(real, shown, settings.practice, settings.known, settings.repeated, rng) if real else ()
        annotators.append(Annotator(secrets.token_urlsafe(TOKEN_BYTES), tasks))
    return tuple(annotators)
