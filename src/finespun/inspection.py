"""Looking at data before a run: what is wrong with it, what a model would be trained on, which of it to take.

Data and model are put together here as a run does it, so that what is seen is what would be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finespun.data.check import Check, check_texts, remember
from finespun.data.formats import ExampleReader, prompt_and_answer
from finespun.data.prepare import LONGEST_DEFAULT, encoded
from finespun.data.readers import BadRow, Origin, Row
from finespun.data.selection import Selection, select
from finespun.data.sources import (
    ERRORS_SHOWN,
    absolute,
    open_sources,
    raise_all,
    read_standard_input,
    rows_of,
    to_jsonl,
)
from finespun.data.templates import Encoder, resolve_prompt_format
from finespun.data.texts import Texts, read_texts
from finespun.errors import DataError
from finespun.files import write_text
from finespun.recipe import DataRecipe, Recipe


@dataclass(frozen=True)
class ShownExample:
    """An example as it would be trained: pieces of text in their order, each with its loss weight; special tokens are
    written out."""

    origin: Origin
    tokens: int
    trained_tokens: int
    pieces: list[tuple[str, float]]


def check(recipe: Recipe, tokens: bool = True, on_row: Callable[[int, int], None] = lambda done, of: None) -> Check:
    """Looks through all data of `recipe`, as it would be trained with its model, or without `tokens` at the texts
    alone. The state of the files is remembered, so that a later run says if they have changed. `on_row` is called with
    the rows looked at so far and their number. Raises `DataError` for what cannot be read, `ModelNotFound` and
    `ModelError`."""
    recipe = recipe.model_copy(deep=True)
    data = recipe.data
    data.on_bad_row = "skip"
    texts = _read(data)
    encoder, max_length = None, None
    if tokens and texts.judged.shape not in ("preference", "rated"):
        encoder, context = _encoder(recipe, texts)
        max_length = data.max_length or min(context, LONGEST_DEFAULT)
    refused = data.too_long == "refuse" or (data.too_long is None and texts.judged.shape != "text")
    total = len(texts.judged.sides)
    found = check_texts(texts, encoder, max_length, refused, lambda done: on_row(done, total))
    remember(found.files)
    return found


def show(recipe: Recipe, count: int = 3, row: int | None = None) -> Iterator[ShownExample | BadRow]:
    """The first `count` examples of `recipe`, or those of the row with this number, as its model would be trained on
    them. Raises as `check` does, and `DataError` for a row that is not there."""
    recipe = recipe.model_copy(deep=True)
    recipe.data.on_bad_row = "skip"
    if not isinstance(recipe.data.validation, list):
        recipe.data.validation = 0.0  # a row is shown whichever side it is on, also where it is the only one
    texts = _read(recipe.data)
    if texts.judged.shape in ("preference", "rated"):
        raise DataError(f"The data is {texts.judged.format} data, which is not trained token by token as it stands.")
    encoder, _ = _encoder(recipe, texts)
    found = (each for each in encoded(texts, encoder) if row is None or each.example.origin.row == row)
    shown = 0
    for each in found if row is not None else islice(found, count):
        shown += 1
        if isinstance(each.made, BadRow):
            yield each.made
        else:
            for example in each.made:
                yield ShownExample(
                    example.origin, len(example.input_ids), example.trained_tokens, encoder.pieces(example)
                )
    if not shown:
        raise DataError(f"There is no row {row}; the data has {len(texts.judged.sides):,} rows.")


def select_rows(pool: DataRecipe, like: Sequence[str], keep: int, out: Path, seed: int = 0) -> Selection:
    """Writes to `out`, as JSONL, the `keep` rows of `pool` that are most like the texts of the sources `like`, the most
    important first; see `finespun.data.selection`. Raises `DataError` and `RunError`."""
    if out.exists():
        raise DataError(f"{out}: is there already. Choose another --out, or remove it.")
    texts = _Pool(pool.model_copy(update={"source": absolute(pool.source or [])}))
    target = _Pool(DataRecipe(source=absolute(like)))
    for side in (target, texts):
        side.refuse_unusable()
    selection = select(texts, target, keep, seed)
    chosen = set(selection.indices)
    rows = {number: row.columns for number, (row, _) in enumerate(texts.usable()) if number in chosen}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, to_jsonl([rows[number] for number in selection.indices]))
    return selection


class _Pool:
    """The texts of sources, read again each time: of prompts with answers both. Rows that cannot be used are passed
    over."""

    def __init__(self, recipe: DataRecipe) -> None:
        self._sources = open_sources(recipe.source or [], recipe.encoding, recipe.documents)
        template = recipe.template.model_dump(exclude_none=True) if recipe.template else None
        self._reader = ExampleReader(recipe.format, recipe.columns, template)

    def refuse_unusable(self) -> None:
        """Raises `DataError` where not one row can be used, with the reasons of the first ones."""
        faults: list[str] = []
        for source in self._sources:
            for row in rows_of(source):
                read = row if isinstance(row, BadRow) else self._reader.read(row)
                if not isinstance(read, BadRow):
                    return
                if len(faults) < ERRORS_SHOWN:
                    faults.append(str(read))
        raise_all(faults, headline="Not one row can be used:")

    def usable(self) -> Iterator[tuple[Row, str]]:
        for source in self._sources:
            for row in rows_of(source):
                if not isinstance(row, BadRow) and not isinstance(example := self._reader.read(row), BadRow):
                    yield row, "\n".join(filter(None, prompt_and_answer(example)))

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.usable())


def _read(data: DataRecipe) -> Texts:
    items = read_standard_input(data.documents, data.encoding) if data.source == ["-"] else None
    return read_texts(data, items)


def _encoder(recipe: Recipe, texts: Texts) -> tuple[Encoder, int]:
    """How the recipe's model is prompted, and its context length."""
    from finespun.models.load import load_tokenizer

    data = recipe.data
    tokenizer, context = load_tokenizer(recipe.model)
    prompt_format = resolve_prompt_format(
        tokenizer, texts.judged.shape, data.prompt_format, data.chat_template, texts.judged.thoughts
    )
    return Encoder(tokenizer, prompt_format, data.train_on), context
