"""Looking at data before a run: what is wrong with it, what a model would be trained on, which of it to take.

Data and model are put together here as a run does it, so that what is seen is what would be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finespun.data.check import Check, check_texts, remember
from finespun.data.formats import prompt_and_answer
from finespun.data.prepare import encoded, encoder_for, settle_lengths
from finespun.data.readers import BadRow, Origin, Row
from finespun.data.selection import Selection, select
from finespun.data.sources import read_standard_input, to_jsonl
from finespun.data.templates import Encoder
from finespun.data.texts import LEFT_OUT, Texts, read_texts
from finespun.errors import DataError, ModelNotFound
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


def check(recipe: Recipe, on_row: Callable[[int, int], None] = lambda done, of: None) -> Check:
    """Looks through all data of `recipe`, as it would be trained with its model. Where the recipe names none, and the
    default one is not on this machine, the texts alone are looked at, and the check says so. The state of the files is
    remembered, so that a later run says if they have changed. `on_row` is called with the rows looked at so far and
    their number. Raises `DataError` for what cannot be read, `ModelNotFound` and `ModelError`."""
    from finespun.models.catalog import locate

    recipe = recipe.model_copy(deep=True)
    data = recipe.data
    data.on_bad_row = "skip"
    texts = _read(data)
    encoder, remarks = None, []
    if texts.judged.shape not in ("preference", "rated"):
        try:
            locate(recipe.model, download="model" in recipe.model_fields_set)
            encoder, context = _encoder(recipe, texts)
            settle_lengths(texts, data, context)
        except ModelNotFound:
            if "model" in recipe.model_fields_set:
                raise
            remarks = [f"{recipe.model} is not on this machine; name a model to count its tokens."]
    total = len(texts.judged.sides)
    found = check_texts(texts, encoder, data.max_length, data.too_long == "refuse", lambda done: on_row(done, total))
    found.remarks += remarks
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


def select_rows(pool: DataRecipe, like: Sequence[str], keep: int, out: Path, seed: int = 0) -> tuple[Selection, int]:
    """Writes to `out`, as JSONL, the `keep` rows of `pool` that are most like the texts of the sources `like`, the most
    important first; see `finespun.data.selection`. Also returns how many rows of the pool could not be used, or were
    left out by its cleaning. Raises `DataError` and `RunError`."""
    if out.exists():
        raise DataError(f"{out}: is there already. Choose another --out, or remove it.")
    texts, target = _Kept(pool), _Kept(DataRecipe(source=list(like)))
    selection = select(texts, target, keep, seed)
    chosen = set(selection.indices)
    rows = {number: row.columns for number, (row, _) in enumerate(texts.rows()) if number in chosen}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, to_jsonl([rows[number] for number in selection.indices]))
    return selection, texts.left_out


class _Kept:
    """The texts of data that can be used and pass its cleaning, read again each time: of prompts with answers both."""

    def __init__(self, data: DataRecipe) -> None:
        self._texts = _read(data.model_copy(update={"on_bad_row": "skip", "validation": 0.0}))
        self.left_out = self._texts.judged.count(LEFT_OUT)

    def rows(self) -> Iterator[tuple[Row, str]]:
        for number, (row, example) in enumerate(self._texts.rows()):
            if row is not None and not isinstance(example, BadRow) and self._texts.judged.sides[number] != LEFT_OUT:
                yield row, "\n".join(filter(None, prompt_and_answer(example)))

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.rows())


def _read(data: DataRecipe) -> Texts:
    items = read_standard_input(data.documents, data.encoding) if data.source == ["-"] else None
    return read_texts(data, items)


def _encoder(recipe: Recipe, texts: Texts) -> tuple[Encoder, int]:
    """How the recipe's model is prompted, and its context length."""
    from finespun.models.load import load_tokenizer

    tokenizer, context = load_tokenizer(recipe.model)
    return encoder_for(texts, tokenizer, recipe.data), context
