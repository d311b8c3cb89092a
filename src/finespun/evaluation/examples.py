"""Test data → the examples of an evaluation: prompts, each with all its references, and what of it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finespun.data.formats import (
    Example,
    ExampleReader,
    Message,
    PreferenceExample,
    RatedExample,
    TextExample,
    Tools,
    Trainable,
    answer_columns,
    detect,
    prompt_and_answer,
    prompt_of,
    shape_of,
)
from finespun.data.quality import repaired
from finespun.data.readers import BadRow, DataFile, Origin, Row
from finespun.data.sources import (
    ERRORS_SHOWN,
    Items,
    MemoryRows,
    Source,
    absolute,
    builtin_sets,
    open_sources,
    raise_all,
    read_standard_input,
    rows_of,
)
from finespun.data.split import content_hash, key_hash
from finespun.data.texts import TRAIN, Texts, read_texts
from finespun.errors import DataError
from finespun.evaluation.outputs import Output
from finespun.evaluation.settings import EvaluationData
from finespun.recipe import DataRecipe, TemplateRecipe

if TYPE_CHECKING:
    from finespun.generation.engine import Completion

ANSWER_COLUMNS = ("completion", "output", "answer", "target", "summary")
"""Where the formats of training data have the answer; of test data, `references` take its place."""


@dataclass
class EvaluationExample:
    """A prompt with what may follow it. `texts` are the rows themselves, on which the likelihood is measured; `rows`
    are hashes of what each says, `prompts` of what each asks."""

    prompt: str | list[Message]
    tools: Tools | None
    origin: Origin
    references: list[str] = field(default_factory=list)
    texts: list[Trainable] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)
    prompts: set[int] = field(default_factory=set)


def outputs_of(examples: Sequence[EvaluationExample], written: Sequence[Completion]) -> list[Output]:
    """What a model wrote for `examples`, one completion for each."""
    return [
        Output(
            index,
            str(example.origin),
            example.prompt,
            tuple(example.references),
            one.text,
            one.finish_reason,
            one.completion_tokens,
        )
        for index, (example, one) in enumerate(zip(examples, written, strict=True))
    ]


@dataclass(frozen=True)
class EvaluationTexts:
    """The examples of an evaluation in the order of their first rows, the number of rows, SHA-256 of each file, and
    whether they are plain texts, whose references are only how each of them happens to go on."""

    examples: list[EvaluationExample]
    rows: int
    files: dict[str, str]
    plain: bool


def read_examples(data: EvaluationData | Items, trained: DataRecipe | None) -> EvaluationTexts:
    """Reads test data as the run's own data, `trained`, was read, unless `data` says otherwise. Rows with the same
    prompt are one example; a row may have `references`, a list, or no answer at all. Raises `DataError` naming the
    rows that cannot be read."""
    sources, recipe = _sources(data, trained)
    reader = _Reader(recipe)
    examples: dict[str, EvaluationExample] = {}
    faults: list[str] = []
    bad = rows = 0
    for row in (row for source in sources for row in rows_of(source)):
        rows += 1
        read = [row] if isinstance(row, BadRow) else reader.read(row)
        for each in read:
            if isinstance(each, BadRow):
                bad += 1
                faults += [str(each)] if bad <= ERRORS_SHOWN else []
            else:
                prompt, references, tools, text, asked = each
                key = json.dumps([prompt, tools], ensure_ascii=False)
                example = examples.setdefault(key, EvaluationExample(prompt, tools, row.origin))
                example.references += [one for one in references if one not in example.references]
                example.prompts |= {key_hash(asked)} if asked else set()
                if text and (content := content_hash(text)) not in example.rows:
                    example.texts.append(text)
                    example.rows.add(content)
    raise_all(faults, "Mend these rows of the test data, or remove them.", bad)
    reader.refuse_mixture()
    files = {
        str(part.path.absolute()) if isinstance(part, DataFile) else part.shown: part.sha256
        for source in sources
        for part in source.parts
    }
    return EvaluationTexts(list(examples.values()), rows, files, reader.plain)


def _sources(data: EvaluationData | Items, trained: DataRecipe | None) -> tuple[list[Source], DataRecipe]:
    recipe = trained.model_copy() if trained else DataRecipe()
    if not isinstance(data, EvaluationData):
        return [Source("data", [MemoryRows(data)])], recipe
    if data.format or data.columns or data.template:  # what the run says of its columns is about other ones
        recipe = recipe.model_copy(update={"format": data.format, "columns": data.columns, "template": data.template})
    if not data.source:
        raise DataError("There is no test data: give --data FILE.")
    if (known := builtin_sets().get(data.source[0])) and not Path(data.source[0]).exists():
        recipe = recipe.model_copy(update={"template": TemplateRecipe(**known.template)})
        return open_sources([str(known.validation)]), recipe
    encoding, documents = data.encoding or recipe.encoding, data.documents or recipe.documents
    if data.source == ["-"]:
        return [Source("-", [MemoryRows(read_standard_input(documents, encoding), "standard input")])], recipe
    return open_sources(absolute(data.source), encoding, documents), recipe


class _Read(NamedTuple):
    """A prompt, the references to it, tools, the row as it would be trained, and what it asks, in one text."""

    prompt: str | list[Message]
    references: list[str]
    tools: Tools | None
    text: Trainable | None
    asked: str


class _Reader:
    """Makes prompts and references of rows."""

    def __init__(self, recipe: DataRecipe) -> None:
        template = recipe.template.model_dump(exclude_none=True) if recipe.template else None
        mend = repaired if recipe.clean and recipe.clean.fix_encoding else None
        self._rows = ExampleReader(recipe.format, recipe.columns, template, mend)
        self._prompts = ExampleReader("prompt-completion", mend=mend)
        self._prompt_column = (recipe.columns or {}).get("prompt", "prompt")
        self._answers = answer_columns(template) if template else set[str]()
        self.plain = False

    def read(self, row: Row) -> list[_Read | BadRow]:
        """What `row` is, once for each reference it has."""
        columns = row.columns
        if "references" in columns:
            return self._with_references(row)
        if self._unanswered(columns):
            return [_without_answer(self._of(self._answered(columns, row.origin)))]
        return [self._of(self._rows.read(row))]

    def refuse_mixture(self) -> None:
        self._rows.refuse_mixture()
        if self.plain and self._prompts.first:
            raise DataError("Some rows of the test data are plain texts, others have prompts; evaluate them apart.")

    def _with_references(self, row: Row) -> list[_Read | BadRow]:
        columns, references = dict(row.columns), row.columns["references"]
        if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
            return [BadRow(row.origin, "has `references` that are not a list of texts.")]
        del columns["references"]
        if not references:
            return [_without_answer(self._of(self._answered(columns, row.origin)))]
        return [self._of(self._answered(columns, row.origin, one)) for one in references]

    def _answered(self, columns: Mapping[str, Any], origin: Origin, answer: str = "?") -> Example | BadRow:
        """The example of a row that has `answer` where its own answer would be."""
        if self._answers:
            filled = {self._rows.columns.get(name, name): answer for name in self._answers}
            return self._rows.read(Row({**columns, **filled}, origin))
        prompt = next((columns[name] for name in (self._prompt_column, "prompt", "messages") if name in columns), None)
        if prompt is not None:
            tools = {name: columns[name] for name in ("tools",) if name in columns}
            return self._prompts.read(Row({"prompt": prompt, "completion": answer, **tools}, origin))
        for name in ANSWER_COLUMNS:
            filled = {**columns, self._rows.columns.get(name, name): answer}
            if detect(dict.fromkeys(self._renamed(filled))) not in (None, "text"):
                return self._rows.read(Row(filled, origin))
        has = ", ".join(map(repr, columns))
        return BadRow(origin, f"has `references`, but nothing that they would answer, such as `prompt`; it has {has}.")

    def _unanswered(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row asks something and has no answer."""
        if self._rows.fill:
            return bool(self._answers) and self._answers.isdisjoint(self._renamed(columns))
        messages = columns.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        open_ended = isinstance(last, Mapping) and last.get("role") in ("user", "tool")
        return open_ended or (self._prompt_column in columns and not {"completion", "chosen"} & self._renamed(columns))

    def _renamed(self, columns: Mapping[str, Any]) -> set[str]:
        names = {old: new for new, old in self._rows.columns.items()}
        return {names.get(name, name) for name in columns}

    def _of(self, example: Example | BadRow) -> _Read | BadRow:
        match example:
            case BadRow():
                return example
            case PreferenceExample() | RatedExample():
                return BadRow(
                    example.origin,
                    f"is {shape_of(example)} data. To evaluate on its good answers, make prompt and completion of its "
                    "columns with --data.template.",
                )
            case TextExample():
                self.plain = True
        asked = prompt_of(example)
        return _Read(asked.prompt, [asked.reference], asked.tools, example, prompt_and_answer(example)[0])


def _without_answer(read: _Read | BadRow) -> _Read | BadRow:
    return read if isinstance(read, BadRow) else read._replace(references=[], text=None)


@dataclass(frozen=True)
class Trained:
    """What a run was trained on, as far as it is still there; `missing` says why it is not."""

    rows: set[int] = field(default_factory=set)
    prompts: set[int] = field(default_factory=set)
    texts: Texts | None = None
    missing: str | None = None

    def holds(self, example: EvaluationExample) -> bool:
        """Whether a row of `example` was trained; where it has no answers, its prompt."""
        return not self.rows.isdisjoint(example.rows) if example.rows else self.asks(example)

    def asks(self, example: EvaluationExample) -> bool:
        """Whether the prompt of `example` was trained, with whatever answer."""
        return not self.prompts.isdisjoint(example.prompts)

    def answers(self) -> Iterator[str]:
        """All that the model was trained to write, row by row."""
        for _, example in self.texts.examples(TRAIN) if self.texts else ():
            yield prompt_and_answer(example)[1]


def read_trained(recipe: DataRecipe | None, recorded: Mapping[str, str]) -> Trained:
    """The training data of a run's `recipe`, if its files are there and have the SHA-256 that the run recorded."""
    if recipe is None:
        return Trained(missing="the training data of a model that is no run is not known")
    try:
        texts = read_texts(recipe.model_copy(deep=True))
    except DataError as error:
        return Trained(missing=f"the training data cannot be read any more ({str(error).splitlines()[0]})")
    if changed := _changed(recorded, texts.files):
        return Trained(missing=f"the training data was changed since the run ({', '.join(changed)})")
    judged = texts.judged
    side = judged.sides == TRAIN
    return Trained(set(judged.contents[side].tolist()), set(judged.prompts[side].tolist()), texts)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    return [name for name in now if before.get(name) != now[name]]
