"""The data stage of a run, end to end: a recipe's `data` → examples, sorted into training and validation → token ids.

The data is read twice. The first time all rows are read and judged, before any model is loaded: what is wrong is said
at once, what is left out is decided. The second time what is kept is tokenized, into files that the next start of the
same run finds again. Neither holds more than a few rows in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finespun.data.formats import (
    Example,
    ExampleReader,
    Message,
    MessagesExample,
    PreferenceExample,
    PromptExample,
    RatedExample,
    Shape,
    TextExample,
    last_prompt,
    prompt_and_answer,
    words_of,
)
from finespun.data.quality import NearDuplicates, repaired
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
from finespun.data.templates import Encoder, LengthLimit, TokenizedExample
from finespun.data.tokens import Share, TokenStore, TokenWriter
from finespun.errors import DataError
from finespun.files import cache_folder, new_folder
from finespun.recipe import CleanRecipe, DataRecipe, TemplateRecipe

LONGEST_DEFAULT = 2048
"""Tokens of the longest example where a recipe does not say; a model's context may allow more, memory often not."""

VALIDATION_SHARE = 0.1
VALIDATION_EXAMPLES = 200
"""A recipe that does not say holds out a tenth, and of more than 2,000 examples about 200: enough for an interval."""

LEFT_OUT, TRAIN, HELD_OUT = range(3)
"""What becomes of a row."""

CACHE_VERSION = 1
"""Part of the name under which token ids are kept: to be raised with each change of how they are made."""

CACHE_DAYS = 30
"""Token ids that no run has used for so long are deleted."""

BATCH_CHARACTERS = 1 << 20
BATCH_EXAMPLES = 2048
"""What is tokenized at once: enough for all cores, little for memory."""


@dataclass
class Texts:
    """The rows of a run as they were judged: where they come from, what they are, and what becomes of each."""

    recipe: DataRecipe
    sources: list[Source]
    held_out_sources: list[Source]
    reader: ExampleReader
    places: Places
    starts: list[int]
    """For each source the number of its first row, in the order of reading."""
    sides: NDArray[np.uint8]
    """For each row in the order of reading `LEFT_OUT`, `TRAIN` or `HELD_OUT`."""
    reasons: dict[int, str]
    """Why a row was left out, by its number in that order."""
    thoughts: bool
    """Whether an answer holds a thought, as those of reasoning models do."""
    how: list[str] = field(default_factory=list)
    """How the data was read, in lines for a person."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of it before training."""

    @property
    def shape(self) -> Shape:
        return self.reader.shape

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by its absolute path (of a data set its fingerprint, by its name)."""
        found: dict[str, str] = {}
        for source in (*self.sources, *self.held_out_sources):
            for part in source.parts:
                name = str(part.path.absolute()) if isinstance(part, DataFile) else part.shown
                if name not in found:  # the members of an archive have its hash, which is computed once
                    found[name] = part.sha256
        return found

    def count(self, side: int) -> int:
        """How many rows are on a side."""
        return int(np.count_nonzero(self.sides == side))

    def examples(self, *sides: int) -> Iterator[tuple[int, Example]]:
        """The examples of these sides with their numbers, read again."""
        for number, (_, example) in enumerate(self.judged()):
            if self.sides[number] in sides and not isinstance(example, BadRow):
                yield number, example

    def judged(self) -> Iterator[tuple[Row | None, Example | BadRow]]:
        """All rows with what they are, read again."""
        for source in (*self.sources, *self.held_out_sources):
            yield from _judged(source, self.reader)


class Places:
    """Where each row stands, in few bytes."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._name, self._row = array("l"), array("q")

    def add(self, origin: Origin) -> None:
        number = self._numbers.setdefault(origin.source, len(self._names))
        if number == len(self._names):
            self._names.append(origin.source)
        self._name.append(number)
        self._row.append(origin.row)

    def __getitem__(self, number: int) -> Origin:
        return Origin(self._names[self._name[number]], self._row[number])


@dataclass
class Tokens:
    """The examples of a run as token ids, and what the length limit did to the training ones. `folder` holds them,
    with `dropped.jsonl`, the rows that were left out."""

    train: TokenStore
    validation: TokenStore
    lengths: LengthLimit
    dropped: int
    mixture: list[Share]
    folder: Path


def read_texts(recipe: DataRecipe, items: Items | None = None) -> Texts:
    """Reads what `recipe` names, or `items` in its place, and settles `recipe`: absolute paths, a set's own template
    and validation file, the share held out. Raises `DataError` for anything that cannot be trained as it is."""
    if items is None:
        _settle_sources(recipe)
        sources = open_sources(recipe.source or [], recipe.encoding, recipe.documents)
    else:
        sources = [Source("data", [MemoryRows(items)])]
    held = recipe.validation if isinstance(recipe.validation, list) else []
    held_sources = open_sources(held, recipe.encoding, recipe.documents)
    template = recipe.template.model_dump(exclude_none=True) if recipe.template else None
    mend = repaired if recipe.clean and recipe.clean.fix_encoding else None
    texts = _judge(recipe, sources, held_sources, ExampleReader(recipe.format, recipe.columns, template, mend))
    texts.how += [
        f"{part.shown}: {how}" for source in (*sources, *held_sources) for part in source.parts if (how := part.how())
    ]
    return texts


def encode_texts(texts: Texts, encoder: Encoder, recipe: DataRecipe, context: int) -> Tokens:
    """Token ids of all examples within the limit, which is settled in `recipe`: the model's `context`, at most 2048
    tokens, where it does not say. They are kept for the next start of the same run. Raises `DataError` for a limit
    beyond the context, for examples beyond the limit unless `recipe` says what to do with them, for such as the chat
    template cannot show, and where nothing is left to train."""
    recipe.max_length = recipe.max_length or min(context, LONGEST_DEFAULT)
    recipe.too_long = recipe.too_long or ("split" if texts.shape == "text" else "refuse")
    if recipe.max_length > context:
        raise DataError(f"data.max_length {recipe.max_length} is longer than the model's context of {context} tokens.")
    if recipe.too_long == "split" and texts.shape != "text":
        raise DataError(
            f"data.too_long split is for texts; the data has the shape {texts.shape}. Choose refuse, cut or skip."
        )
    if recipe.overlap >= recipe.max_length - 1:
        raise DataError(f"data.overlap {recipe.overlap} leaves nothing new in {recipe.max_length} tokens.")
    if texts.shape in ("preference", "rated"):
        raise DataError(
            f"The data is {texts.reader.format} data, which fine-tuning on answers does not take. To train on its good "
            "answers alone, make prompt and completion of its columns with data.template."
        )
    folder = token_cache() / _key(texts, encoder, recipe)
    if not (folder / "report.json").is_file():
        _forget_old(folder.parent)
        with new_folder(folder) as new:
            _write_tokens(texts, encoder, recipe, new)
    folder.touch()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    train = TokenStore(folder / "train")
    return Tokens(
        train,
        TokenStore(folder / "validation"),
        LengthLimit(**report["lengths"]),
        report["dropped"],
        _mixture(texts.sources, train),
        folder,
    )


def encoded(texts: Texts, encoder: Encoder) -> Iterator[tuple[int, Row | None, list[TokenizedExample] | BadRow]]:
    """Each row that is kept, with its number, as token ids, or why it cannot be trained; and each that is left out as a
    `BadRow`. While one batch is tokenized on all cores, the next is read."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[list[_Waiting], Future]] = deque()
        for batch in _batches(texts, encoder):
            sequences = [sequence for each in batch if not isinstance(each.made, BadRow) for sequence in each.made]
            waiting.append((batch, pool.submit(encoder.tokenize, sequences)))
            if len(waiting) > 2:
                yield from _collect(*waiting.popleft())
        while waiting:
            yield from _collect(*waiting.popleft())


def prompt_of(example: Example) -> tuple[str | list[Message], str]:
    """What stands before the text to be written, and that text: for showing a model at work on `example`.

    A plain text is divided behind its first line, or where that is long, in its first 60 characters.
    """
    match example:
        case PromptExample(prompt, completion):
            return prompt, completion
        case MessagesExample(messages):
            return last_prompt(messages)
        case TextExample(text):
            first_line = text.find("\n") + 1
            at = first_line if 0 < first_line <= 80 < len(text) else text.rfind(" ", 1, 60)
            at = at if at > 0 else min(20, len(text) // 2)
            return text[:at], text[at:]
        case RatedExample(inner):
            return prompt_of(inner)
        case PreferenceExample(prompt, chosen):
            asked = prompt if isinstance(prompt, str) else list(prompt)
            return asked, chosen if isinstance(chosen, str) else "\n".join(words_of(chosen))


def token_cache() -> Path:
    """Where token ids are kept."""
    return cache_folder() / "tokens"


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


def _judged(source: Source, reader: ExampleReader) -> Iterator[tuple[Row | None, Example | BadRow]]:
    for row in rows_of(source):
        yield (None, row) if isinstance(row, BadRow) else (row, reader.read(row))


def _judge(recipe: DataRecipe, sources: list[Source], held: list[Source], reader: ExampleReader) -> Texts:
    """Reads all rows once: which are usable, which are left out, which are held out."""
    places, hashes, prompts, groups = Places(), array("Q"), array("Q"), array("Q")
    reasons: dict[int, str] = {}
    faults: list[str] = []
    count = _Counts()
    clean = recipe.clean or CleanRecipe()
    near = NearDuplicates() if clean.deduplicate == "near" else None
    starts: list[int] = []
    total = 0
    for source in (*sources, *held):
        starts.append(total)
        for row, example in _judged(source, reader):
            number, total = total, total + 1
            places.add(example.origin)
            group = None
            if row is not None and not isinstance(example, BadRow) and recipe.group_by:
                group = row.columns.get(recipe.group_by)
                if group is None:
                    has = ", ".join(map(repr, row.columns))
                    example = BadRow(
                        row.origin, f"has no {recipe.group_by!r}, by which data.group_by groups; it has {has}."
                    )
            if isinstance(example, BadRow):
                count.bad += 1
                if len(faults) < ERRORS_SHOWN:
                    faults.append(str(example))
                reasons[number] = example.reason
                hashes.append(0)
                prompts.append(0)
                groups.append(0)
                continue
            prompt, answer = prompt_and_answer(example)
            hashes.append(content_hash(example))
            prompts.append(key_hash(prompt) if prompt else 0)
            groups.append(key_hash(str(group)) if recipe.group_by else hashes[-1])
            count.look(prompt, answer)
            if len(starts) <= len(sources):
                reason = _filtered(answer, f"{prompt}\n{answer}", clean)
                if reason is None and near and (like := near.first_like(f"{prompt}\n{answer}", number)) is not None:
                    reason = f"says nearly the same as {places[like]}"
                if reason:
                    reasons[number] = reason
    if recipe.on_bad_row == "refuse":
        raise_all(faults, "Mend these rows, or leave them out with --data.on-bad-row skip.", count.bad)
    reader.refuse_mixture()
    sides = np.full(total, TRAIN, dtype=np.uint8)
    trained_rows = starts[len(sources)] if held else total
    sides[trained_rows:] = HELD_OUT
    sides[list(reasons)] = LEFT_OUT
    hash_array = np.array(hashes, dtype=np.uint64)
    repeats = _repeats(hash_array, sides)
    if clean.deduplicate:
        for number, first in repeats:
            reasons[number] = f"says the same as {places[first]}"
            sides[number] = LEFT_OUT
    kept = sides == TRAIN
    if not kept.any():
        raise DataError(
            f"Nothing is left to train: all {trained_rows} rows were left out, the first since it {reasons[0]}"
        )
    if not held:
        if recipe.validation is None:
            recipe.validation = min(VALIDATION_SHARE, VALIDATION_EXAMPLES / int(kept.sum()))
        assert isinstance(recipe.validation, float | int)
        sides[np.flatnonzero(kept)[hold_out(np.array(groups, dtype=np.uint64)[kept], recipe.validation)]] = HELD_OUT
    texts = Texts(recipe, sources, held, reader, places, starts, sides, reasons, count.thoughts)
    texts.how.append(_read_line(texts, total))
    texts.notes += _notes(texts, count, hash_array, np.array(prompts, dtype=np.uint64), len(repeats))
    return texts


@dataclass
class _Counts:
    """What is counted of the rows in passing."""

    bad: int = 0
    short: int = 0
    echoes: int = 0
    thoughts: bool = False

    def look(self, prompt: str, answer: str) -> None:
        stripped = answer.strip()
        # an answer of one word, or of one or two characters where words are not divided
        self.short += len(stripped) < 2 or (stripped.isascii() and not any(map(str.isspace, stripped)))
        self.echoes += bool(prompt) and stripped == prompt.strip()
        self.thoughts = self.thoughts or "</think>" in answer


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
    """Training rows that say what an earlier one says: their numbers, and those of the first."""
    numbers = np.flatnonzero(sides == TRAIN)
    order = np.argsort(hashes[numbers], kind="stable")
    ordered = hashes[numbers][order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first = np.searchsorted(ordered, ordered[same])
    return sorted(zip(numbers[order[same]].tolist(), numbers[order[first]].tolist(), strict=True))


def _read_line(texts: Texts, total: int) -> str:
    names = [source.name for source in (*texts.sources, *texts.held_out_sources)]
    parts = sum(len(source.parts) for source in (*texts.sources, *texts.held_out_sources))
    where = ", ".join(Path(name).name or name for name in names[:3]) + (" ..." if len(names) > 3 else "")
    files = f" ({parts} files)" if parts > len(names) else ""
    unused = f"; columns not used: {', '.join(texts.reader.unused)}" if texts.reader.unused else ""
    return f"{where}{files}: {total:,} rows, format {texts.reader.format}{unused}"


def _notes(
    texts: Texts, count: _Counts, hashes: NDArray[np.uint64], prompts: NDArray[np.uint64], repeats: int
) -> list[str]:
    sides = texts.sides
    trained, held = sides == TRAIN, sides == HELD_OUT
    notes = []
    if texts.reasons:
        kinds = Counter(
            re.split(r"[\d'`]|says (?:nearly )?the same", reason)[0].strip() or "repeated"
            for reason in texts.reasons.values()
        )
        said = ", ".join(f"{number:,} × “{kind} ...”" for kind, number in kinds.most_common(3))
        notes.append(f"{len(texts.reasons):,} rows are left out: {said} (dropped.jsonl has each with its reason)")
    if repeats and not (texts.recipe.clean and texts.recipe.clean.deduplicate):
        notes.append(f"{repeats:,} rows say the same as an earlier one (data.clean.deduplicate exact leaves them out)")
    if count.short:
        notes.append(f"{count.short:,} answers are a single word")
    if count.echoes:
        notes.append(f"{count.echoes:,} answers only repeat the prompt")
    if both := int(np.isin(hashes[held], hashes[trained]).sum()):
        notes.append(f"{both:,} of {int(held.sum()):,} held-out examples are also trained: perplexity will flatter")
    asked = held & (prompts != 0)
    if both := int(np.isin(prompts[asked], prompts[trained]).sum()):
        notes.append(
            f"{both:,} of {int(asked.sum()):,} held-out prompts are also trained, with other answers or the same "
            "(data.group_by with the column of the prompt keeps them apart)"
        )
    return notes


class _Waiting(NamedTuple):
    number: int
    row: Row | None
    made: Any  # the encoder's sequences, or a BadRow


def _batches(texts: Texts, encoder: Encoder) -> Iterator[list[_Waiting]]:
    batch: list[_Waiting] = []
    size = 0
    for number, (row, example) in enumerate(texts.judged()):
        if reason := texts.reasons.get(number):
            made: Any = BadRow(example.origin, reason)
        else:
            assert isinstance(example, TextExample | PromptExample | MessagesExample)
            made = encoder.sequences(example)
            if not isinstance(made, BadRow):
                size += sum(len(piece.text) for sequence in made for piece in sequence.pieces)
        batch.append(_Waiting(number, row, made))
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_EXAMPLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _collect(
    batch: list[_Waiting], tokenized: Future[list[TokenizedExample | BadRow]]
) -> Iterator[tuple[int, Row | None, list[TokenizedExample] | BadRow]]:
    results = iter(tokenized.result())
    for number, row, made in batch:
        if isinstance(made, BadRow):
            yield number, row, made
            continue
        parts = [next(results) for _ in made]
        bad = next((part for part in parts if isinstance(part, BadRow)), None)
        yield number, row, bad or [part for part in parts if isinstance(part, TokenizedExample)]


def _write_tokens(texts: Texts, encoder: Encoder, recipe: DataRecipe, folder: Path) -> None:
    """Fills `folder` with the token ids of both sides, the rows that were left out, and what the length limit did."""
    assert recipe.max_length is not None
    assert recipe.too_long is not None
    limits = {side: LengthLimit(recipe.max_length, recipe.too_long, recipe.overlap) for side in (TRAIN, HELD_OUT)}
    faults, long, cut = _Faults(), _Faults(), _Faults()
    starts = texts.starts[: len(texts.sources)]
    dropped = 0
    vocabulary = len(encoder.tokenizer)
    with (
        TokenWriter(folder / "train", vocabulary) as train,
        TokenWriter(folder / "validation", vocabulary) as validation,
        # half a character, for which a row may be left out, is written as JSON's escape for it
        (folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as left_out,
    ):
        for number, row, made in encoded(texts, encoder):
            while starts and number >= starts[0]:
                starts.pop(0)
                train.begin_source()
            side = int(texts.sides[number])
            reason = made.reason if isinstance(made, BadRow) else None
            parts: list[TokenizedExample] = []
            if isinstance(made, BadRow):
                if side != LEFT_OUT and recipe.on_bad_row == "refuse":
                    faults.add(str(made))
            else:
                for example in made:
                    fitted = limits[side].fit(example)
                    if isinstance(fitted, BadRow):
                        (long if recipe.too_long == "refuse" else cut).add(str(fitted))
                    elif not fitted:
                        reason = f"has {len(example.input_ids)} tokens, more than data.max_length {recipe.max_length}"
                    elif not all(part.trained_tokens for part in fitted):
                        # A step of such examples alone would divide by a weight of zero.
                        faults.add(
                            f"{example.origin}: a single token, none of which carries loss: there is nothing to learn."
                        )
                    else:
                        parts += fitted
                if parts:
                    reason = None
            if reason is not None:
                dropped += 1
                place = texts.places[number]
                line = {
                    "file": place.source,
                    "row": place.row,
                    "reason": reason,
                    "columns": row.columns if row else None,
                }
                left_out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            (train if side == TRAIN else validation).add(parts)
    faults.refuse("Remove these rows, or leave them out with --data.on-bad-row skip.")
    both = limits[TRAIN].count + limits[HELD_OUT].count
    longest = max(limit.longest for limit in limits.values())
    long.refuse(
        "Raise data.max_length if the model's context allows it, or choose data.too_long cut, cut-left, skip or (texts "
        "only) split.",
        f"{both} of {texts.count(TRAIN) + texts.count(HELD_OUT)} examples are longer than data.max_length "
        f"{recipe.max_length}; the longest has {longest} tokens.",
    )
    cut.refuse("Raise data.max_length, shorten these prompts, or leave the examples out with data.too_long skip.")
    report = {"lengths": asdict(limits[TRAIN]), "dropped": dropped}
    if not len(TokenStore(folder / "train")):
        raise DataError(
            f"All {texts.count(TRAIN)} examples are longer than data.max_length {recipe.max_length}, and "
            "data.too_long skip leaves none."
        )
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


class _Faults:
    """The first faults, and how many there are."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, fault: str) -> None:
        self.count += 1
        if self.count <= ERRORS_SHOWN:
            self.first.append(fault)

    def refuse(self, remedy: str, headline: str = "") -> None:
        raise_all(self.first, remedy, self.count, headline)


def _mixture(sources: Sequence[Source], train: TokenStore) -> list[Share]:
    """How many examples an epoch takes of each source: as many in all as there are, divided by the weights. Empty where
    sources have no weights and each example comes once."""
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return []
    ends = [*train.groups[1:], len(train)]
    shares = [
        Share(first, end, max(1, round(len(train) * weight / sum(weights))))
        for first, end, weight in zip(train.groups, ends, weights, strict=True)
    ]
    if empty := next(
        (source.name for source, share in zip(sources, shares, strict=True) if share.first == share.end), None
    ):
        raise DataError(f"{empty}: has a weight, but no example of it is left to train.")
    return shares


def _key(texts: Texts, encoder: Encoder, recipe: DataRecipe) -> str:
    """A hash of all that token ids depend on: data, settings, tokenizer."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [
        CACHE_VERSION,
        texts.files,
        recipe.model_dump(
            exclude={"source"} if any(isinstance(p, MemoryRows) for s in texts.sources for p in s.parts) else None
        ),
        hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        encoder.prompt_format,
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[
        :32
    ]


def _forget_old(cache: Path) -> None:
    limit = time.time() - CACHE_DAYS * 24 * 3600
    for folder in cache.iterdir() if cache.is_dir() else ():
        if folder.stat().st_mtime < limit:
            shutil.rmtree(folder, ignore_errors=True)
