"""The data stage of a run, end to end: a recipe's `data` → examples → token ids within the length limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finespun.data.formats import (
    Example,
    Message,
    MessagesExample,
    PromptExample,
    Shape,
    TextExample,
    examples_from_rows,
)
from finespun.data.sources import Row, builtin_sets, expand, raise_all, read_file, rows_from_memory
from finespun.data.split import hold_out
from finespun.data.templates import Encoder, LengthReport, TokenizedExample, fit_length
from finespun.errors import DataError
from finespun.recipe import DataRecipe, TemplateRecipe

LONGEST_DEFAULT = 2048
"""Tokens of the longest example where a recipe does not say; a model's context may allow more, memory often not."""

VALIDATION_SHARE = 0.1
VALIDATION_EXAMPLES = 200
"""A recipe that does not say holds out a tenth, and of more than 2,000 examples about 200: enough for an interval."""

Items = Sequence[str | Mapping[str, Any]]


@dataclass
class Texts:
    """The examples of a run, and how they were read, one line a source."""

    shape: Shape
    train: list[Example]
    validation: list[Example]
    files: list[Path]
    how: list[str] = field(default_factory=list)


@dataclass
class Tokens:
    """The examples of a run as token ids, and what the length limit did to the training ones."""

    train: list[TokenizedExample]
    validation: list[TokenizedExample]
    lengths: LengthReport


def read_texts(recipe: DataRecipe, items: Items | None = None) -> Texts:
    """Reads what `recipe` names, or `items` in its place, and settles `recipe`: absolute paths, a set's own template
    and validation file, the share held out. Raises `DataError` for anything that cannot be trained as it is."""
    texts = Texts("text", [], [], [])
    if items is None:
        _settle_sources(recipe)
        rows = _read_all(recipe.source or [], recipe, texts)
    else:
        rows = rows_from_memory(items)
        texts.how.append(f"{len(rows)} rows from memory")
    template = recipe.template.model_dump(exclude_none=True) if recipe.template else None
    examples, texts.shape = examples_from_rows(rows, template)
    if isinstance(recipe.validation, list):
        held, shape = examples_from_rows(_read_all(recipe.validation, recipe, texts), template)
        if shape != texts.shape:
            raise DataError(
                f"The validation data has the shape {shape}, the training data {texts.shape}; they must be the same."
            )
        texts.train, texts.validation = examples, held
    else:
        if recipe.validation is None:
            recipe.validation = min(VALIDATION_SHARE, VALIDATION_EXAMPLES / len(examples))
        texts.train, texts.validation = hold_out(examples, recipe.validation)
    return texts


def encode_texts(texts: Texts, encoder: Encoder, recipe: DataRecipe, context: int) -> Tokens:
    """Token ids of all examples within the limit, which is settled in `recipe`: the model's `context`, at most 2048
    tokens, where it does not say. Raises `DataError` for a limit beyond the context, for examples beyond the limit
    unless `recipe` says what to do with them, and where nothing is left to train."""
    recipe.max_length = recipe.max_length or min(context, LONGEST_DEFAULT)
    recipe.too_long = recipe.too_long or ("split" if texts.shape == "text" else "refuse")
    if recipe.max_length > context:
        raise DataError(f"data.max_length {recipe.max_length} is longer than the model's context of {context} tokens.")
    if recipe.too_long == "split" and texts.shape != "text":
        raise DataError(
            f"data.too_long split is for texts; the data has the shape {texts.shape}. Choose refuse, cut or skip."
        )
    train, lengths = fit_length(
        [encoder.encode_example(example) for example in texts.train], recipe.max_length, recipe.too_long
    )
    validation: list[TokenizedExample] = []
    if texts.validation:
        validation, _ = fit_length(
            [encoder.encode_example(example) for example in texts.validation], recipe.max_length, recipe.too_long
        )
    # A step of such examples alone would divide by a weight of zero.
    raise_all(
        [
            f"{example.origin}: a single token, none of which carries loss: there is nothing to learn from it."
            for example in (*train, *validation)
            if not example.trained_tokens
        ],
        "Remove these rows.",
    )
    return Tokens(train, validation, lengths)


def prompt_of(example: Example) -> tuple[str | list[Message], str]:
    """What stands before the text to be written, and that text: for showing a model at work on `example`.

    A plain text is divided behind its first line, or where that is long, in its first 60 characters.
    """
    match example:
        case PromptExample(prompt, completion):
            return prompt, completion
        case MessagesExample(messages):
            last = max(position for position, message in enumerate(messages) if message["role"] == "assistant")
            return list(messages[:last]), messages[last]["content"]
        case TextExample(text):
            first_line = text.find("\n") + 1
            at = first_line if 0 < first_line <= 80 < len(text) else text.rfind(" ", 1, 60)
            at = at if at > 0 else min(20, len(text) // 2)
            return text[:at], text[at:]


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
    recipe.source = [str(path.absolute()) for path in expand(recipe.source)]
    if isinstance(recipe.validation, list):
        recipe.validation = [str(path.absolute()) for path in expand(recipe.validation)]


def _read_all(sources: Sequence[str], recipe: DataRecipe, texts: Texts) -> list[Row]:
    rows: list[Row] = []
    here = Path.cwd()
    for path in map(Path, sources):
        # named in messages as a person in this folder would name it
        read, how = read_file(path.relative_to(here) if path.is_relative_to(here) else path, recipe.documents)
        rows.extend(read)
        texts.files.append(path)
        texts.how.append(f"{path.name}: {how}")
    return rows
