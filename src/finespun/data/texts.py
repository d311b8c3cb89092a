"""A recipe's `data` → its rows, judged: which can be used, which are left out and why, which are held out.

This is the first of two readings, before any model is loaded, so that what is wrong is said at once. A few numbers are
kept of each row, and found again at the next start with the same data.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finespun.data.formats import Example, ExampleReader, Shape, prompt_and_answer
from finespun.data.quality import NearDuplicateExamples, is_echo, is_single_word, repaired
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
    rows_of,
)
from finespun.data.split import content_hash, hold_out, key_hash
from finespun.errors import DataError
from finespun.files import data_cache, forget_old, hash_of, new_folder
from finespun.recipe import CleanRecipe, DataRecipe, TemplateRecipe

VALIDATION_SHARE = 0.1
VALIDATION_EXAMPLES = 200
"""A recipe that does not say holds out a tenth, and of more than 2,000 examples about 200: enough for an interval."""

LEFT_OUT, TRAIN, HELD_OUT = range(3)
"""What becomes of a row."""

MADE_BY = f"{version('finespun')}, 2"
"""Part of the name under which judged rows and token ids are kept, so that each version makes its own. The number is to
be raised with each change of how they are made."""


class Places:
    """Where each row stands, in few bytes."""

    def __init__(self, names: list[str] | None = None, number: bytes = b"", row: bytes = b"") -> None:
        self.names = names or []
        self._numbers = {name: at for at, name in enumerate(self.names)}
        self.number, self.row = array("i", number), array("q", row)

    def add(self, origin: Origin) -> None:
        number = self._numbers.setdefault(origin.source, len(self.names))
        if number == len(self.names):
            self.names.append(origin.source)
        self.number.append(number)
        self.row.append(origin.row)

    def __getitem__(self, number: int) -> Origin:
        return Origin(self.names[self.number[number]], self.row[number])


@dataclass
class Judged:
    """What was found out about the rows of a run, numbered in the order of reading."""

    format: str
    """What the rows are, in a word."""
    shape: Shape
    unused: list[str]
    """Columns that no example was made of."""
    places: Places
    starts: list[int]
    """For each source the number of its first row."""
    sides: NDArray[np.uint8]
    """For each row `LEFT_OUT`, `TRAIN` or `HELD_OUT`."""
    contents: NDArray[np.uint64]
    """For each row a hash of all it says; of its prompt, `prompts`, 0 where it has none."""
    prompts: NDArray[np.uint64]
    reasons: dict[int, str]
    """Why a row was left out, by its number."""
    validation: float | None
    """The share held out, where none are named."""
    single_words: int = 0
    """Answers of one word; those that only repeat the prompt are `echoes`."""
    echoes: int = 0
    thoughts: bool = False
    """Whether an answer holds a thought, as those of reasoning models do."""

    def count(self, side: int) -> int:
        """How many rows are on a side."""
        return int(np.count_nonzero(self.sides == side))

    def repeats(self) -> list[tuple[int, int]]:
        """Training rows that say what an earlier one says: their numbers, and those of the first."""
        return _repeats(self.contents, self.sides)

    def seen_in_training(self, what: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The held-out rows whose `contents` or `prompts` are those of a row that is trained."""
        held = np.flatnonzero((self.sides == HELD_OUT) & (what != 0))
        return held[np.isin(what[held], what[self.sides == TRAIN])]

    def save(self, folder: Path) -> None:
        """Writes all of it into `folder`."""
        np.savez(
            folder / "rows.npz",
            number=np.frombuffer(self.places.number, np.int32),
            row=np.frombuffer(self.places.row, np.int64),
            sides=self.sides,
            contents=self.contents,
            prompts=self.prompts,
        )
        others = ("format", "shape", "unused", "starts", "validation", "single_words", "echoes", "thoughts")
        about = {name: getattr(self, name) for name in others}
        about |= {"names": self.places.names, "reasons": list(self.reasons.items())}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Judged:
        """What `save` wrote."""
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        with np.load(folder / "rows.npz") as rows:
            places = Places(about.pop("names"), rows["number"].tobytes(), rows["row"].tobytes())
            arrays = {name: rows[name] for name in ("sides", "contents", "prompts")}
        return cls(places=places, **arrays, **about | {"reasons": dict(about["reasons"])})


@dataclass
class Texts:
    """The texts of a run: where they come from, how they are read, and what becomes of each row."""

    recipe: DataRecipe
    sources: list[Source]
    held_out_sources: list[Source]
    reader: ExampleReader
    judged: Judged
    choices: list[str]
    """How files were read where there was a choice, in lines for a person."""

    @property
    def how(self) -> list[str]:
        """What was read and how, in lines for a person."""
        return [_read_line(self), *self.choices]

    @property
    def notes(self) -> list[str]:
        """What a person should know of it before training."""
        return _notes(self)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by its absolute path (of a data set its fingerprint, by its name)."""
        return _hashes([*self.sources, *self.held_out_sources])

    def examples(self, side: int) -> Iterator[tuple[int, Example]]:
        """The examples of a side with their numbers, read again."""
        for number, (_, example) in enumerate(self.rows()):
            if self.judged.sides[number] == side and not isinstance(example, BadRow):
                yield number, example

    def rows(self) -> Iterator[tuple[Row | None, Example | BadRow]]:
        """All rows, used or not, with what they are, read again."""
        for source in (*self.sources, *self.held_out_sources):
            yield from _read(source, self.reader, self.recipe.group_by)


def read_texts(recipe: DataRecipe, items: Items | None = None) -> Texts:
    """Reads what `recipe` names, or `items` in its place, and settles `recipe`: absolute paths, a set's own template
    and validation file, the share held out. Raises `DataError` for anything that cannot be trained as it is."""
    if items is None:
        _settle_sources(recipe)
        sources = open_sources(recipe.source or [], recipe.encoding, recipe.documents)
    else:
        sources = [Source("data", [MemoryRows(items)])]
    named = recipe.validation if isinstance(recipe.validation, list) else []
    held = open_sources(named, recipe.encoding, recipe.documents)
    template = recipe.template.model_dump(exclude_none=True) if recipe.template else None
    mend = repaired if recipe.clean and recipe.clean.fix_encoding else None
    reader = ExampleReader(recipe.format, recipe.columns, template, mend)
    folder = data_cache() / "rows" / _key(sources, held, recipe)
    if not (folder / "about.json").is_file():
        forget_old(folder.parent)
        with new_folder(folder) as new:
            judged = _judge(recipe, sources, held, reader)
            judged.save(new)
            how = [
                f"{part.shown}: {how}" for source in (*sources, *held) for part in source.parts if (how := part.how())
            ]
            (new / "how.json").write_text(json.dumps(how), encoding="utf-8")
    folder.touch()
    judged, how = Judged.load(folder), json.loads((folder / "how.json").read_text(encoding="utf-8"))
    if not held:
        recipe.validation = judged.validation
    return Texts(recipe, sources, held, reader, judged, how)


def _hashes(sources: list[Source]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        for part in source.parts:
            name = str(part.path.absolute()) if isinstance(part, DataFile) else part.shown
            if name not in found:  # the members of an archive have its hash, which is computed once
                found[name] = part.sha256
    return found


def _key(sources: list[Source], held: list[Source], recipe: DataRecipe) -> str:
    """A hash of all that a judgement depends on: data, its names in messages, settings."""
    files = [[[part.shown for part in source.parts] for source in side] for side in (sources, held)]
    of_tokens = {"source", "prompt_format", "chat_template", "train_on", "max_length", "too_long", "overlap"}
    return hash_of([MADE_BY, files, _hashes(sources), _hashes(held), recipe.model_dump(exclude=of_tokens)])


def _settle_sources(recipe: DataRecipe) -> None:
    if not recipe.source:
        raise DataError("There is no data: give --data FILE, or the fables that come with finespun: --data fables")
    sets = builtin_sets()
    if named := [source for source in recipe.source if source in sets and not Path(source).exists()]:
        if len(recipe.source) > 1:
            raise DataError(
                f"{named[0]}: a set that comes with finespun has its own columns and split; train it alone."
            )
        chosen = sets[named[0]]
        recipe.source = [str(chosen.train)]
        recipe.template = recipe.template or TemplateRecipe(**chosen.template)
        recipe.validation = [str(chosen.validation)] if recipe.validation is None else recipe.validation
    recipe.source = absolute(recipe.source)
    if isinstance(recipe.validation, list):
        recipe.validation = absolute(recipe.validation)


def _read(source: Source, reader: ExampleReader, group_by: str | None) -> Iterator[tuple[Row | None, Example | BadRow]]:
    for row in rows_of(source):
        if isinstance(row, BadRow):
            yield None, row
        elif group_by and row.columns.get(group_by) is None:
            has = ", ".join(map(repr, row.columns))
            yield row, BadRow(row.origin, f"has no {group_by!r}, by which data.group_by groups; it has {has}.")
        else:
            yield row, reader.read(row)


def _judge(recipe: DataRecipe, sources: list[Source], held: list[Source], reader: ExampleReader) -> Judged:
    """Reads all rows once: which are usable, which are left out, which are held out."""
    places, contents, prompts, groups = Places(), array("Q"), array("Q"), array("Q")
    reasons: dict[int, str] = {}
    faults: list[str] = []
    bad = single_words = echoes = 0
    thoughts = False
    clean = recipe.clean or CleanRecipe()
    near = NearDuplicateExamples() if clean.deduplicate == "near" else None
    starts: list[int] = []
    total = 0
    for source in (*sources, *held):
        starts.append(total)
        for row, example in _read(source, reader, recipe.group_by):
            number, total = total, total + 1
            places.add(example.origin)
            if isinstance(example, BadRow):
                bad += 1
                if len(faults) < ERRORS_SHOWN:
                    faults.append(str(example))
                reasons[number] = example.reason
                for numbers in (contents, prompts, groups):
                    numbers.append(0)
                continue
            prompt, answer = prompt_and_answer(example)
            contents.append(content_hash(example))
            prompts.append(key_hash(prompt) if prompt else 0)
            groups.append(key_hash(str(row.columns[recipe.group_by])) if recipe.group_by and row else contents[-1])
            single_words += is_single_word(answer)
            echoes += is_echo(prompt, answer)
            thoughts = thoughts or "</think>" in answer
            if len(starts) <= len(sources):
                reason = _filtered(answer, f"{prompt}\n{answer}", clean)
                if reason is None and near and (like := near.first_like(prompt, answer, number)) is not None:
                    reason = f"says nearly the same as {places[like]}"
                if reason:
                    reasons[number] = reason
    if recipe.on_bad_row == "refuse":
        raise_all(faults, "Mend these rows, or leave them out with --data.on-bad-row skip.", bad)
    reader.refuse_mixture()
    sides = np.full(total, TRAIN, dtype=np.uint8)
    trained_rows = starts[len(sources)] if held else total
    sides[trained_rows:] = HELD_OUT
    sides[list(reasons)] = LEFT_OUT
    hashes = np.array(contents, dtype=np.uint64)
    if clean.deduplicate:
        for number, first in _repeats(hashes, sides):
            reasons[number] = f"says the same as {places[first]}"
            sides[number] = LEFT_OUT
    kept = sides == TRAIN
    if not kept.any():
        if bad >= trained_rows:
            raise_all(faults, count=bad, headline="Not one row can be used:")
        raise DataError(
            f"Nothing is left to train: all {trained_rows} rows were left out, the first since it {reasons[0]}"
        )
    validation = recipe.validation if isinstance(recipe.validation, float | int) else None
    if not held:
        if validation is None:
            validation = min(VALIDATION_SHARE, VALIDATION_EXAMPLES / int(kept.sum()))
        sides[np.flatnonzero(kept)[hold_out(np.array(groups, dtype=np.uint64)[kept], validation)]] = HELD_OUT
    return Judged(
        reader.format,
        reader.shape,
        list(reader.unused),
        places,
        starts,
        sides,
        hashes,
        np.array(prompts, dtype=np.uint64),
        reasons,
        validation,
        single_words,
        echoes,
        thoughts,
    )


def _filtered(answer: str, whole: str, clean: CleanRecipe) -> str | None:
    """Why an example does not pass the filters."""
    length = len(answer)
    if clean.min_characters and length < clean.min_characters:
        return f"has {length} characters, fewer than data.clean.min_characters {clean.min_characters}"
    if clean.max_characters and length > clean.max_characters:
        return f"has {length} characters, more than data.clean.max_characters {clean.max_characters}"
    if clean.keep_matching and not re.search(clean.keep_matching, whole):
        return "does not match data.clean.keep_matching"
    if clean.drop_matching and (match := re.search(clean.drop_matching, whole)):
        return f"matches data.clean.drop_matching with {match[0][:60]!r}"
    return None


def _repeats(hashes: NDArray[np.uint64], sides: NDArray[np.uint8]) -> list[tuple[int, int]]:
    numbers = np.flatnonzero(sides == TRAIN)
    order = np.argsort(hashes[numbers], kind="stable")
    ordered = hashes[numbers][order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first = np.searchsorted(ordered, ordered[same])
    return sorted(zip(numbers[order[same]].tolist(), numbers[order[first]].tolist(), strict=True))


def _read_line(texts: Texts) -> str:
    sources = [*texts.sources, *texts.held_out_sources]
    names = [source.name for source in sources]
    parts = sum(len(source.parts) for source in sources)
    where = ", ".join(Path(name).name or name for name in names[:3]) + (" ..." if len(names) > 3 else "")
    files = f" ({parts} files)" if parts > len(names) else ""
    idle = [name for name in texts.judged.unused if name != texts.recipe.group_by]
    unused = f"; columns not used: {', '.join(idle)}" if idle else ""
    return f"{where}{files}: {len(texts.judged.sides):,} rows, format {texts.judged.format}{unused}"


def kind_of(reason: str) -> str:
    """A reason without what differs from row to row."""
    if match := re.match(r"says (?:nearly )?the same as ", reason):
        return f"{match[0]}an earlier one"
    return re.split(r"[\d'\"]", reason)[0].strip()


def _notes(texts: Texts) -> list[str]:
    judged = texts.judged
    notes = []
    if judged.reasons:
        kinds = Counter(map(kind_of, judged.reasons.values()))
        said = ", ".join(f"{number:,} × “{kind} ...”" for kind, number in kinds.most_common(3))
        notes.append(f"{len(judged.reasons):,} rows are left out: {said} (dropped.jsonl has each with its reason)")
    if not (texts.recipe.clean and texts.recipe.clean.deduplicate) and (repeats := len(judged.repeats())):
        notes.append(f"{repeats:,} rows say the same as an earlier one (data.clean.deduplicate exact leaves them out)")
    if judged.single_words:
        notes.append(f"{judged.single_words:,} answers are a single word")
    if judged.echoes:
        notes.append(f"{judged.echoes:,} answers only repeat the prompt")
    held = judged.count(HELD_OUT)
    if both := len(judged.seen_in_training(judged.contents)):
        notes.append(f"{both:,} of {held:,} held-out examples are also trained: perplexity will flatter")
    if both := len(judged.seen_in_training(judged.prompts)):
        notes.append(
            f"{both:,} of {held:,} held-out prompts are also trained, with other answers or the same "
            "(data.group_by with the column of the prompt keeps them apart)"
        )
    return notes
