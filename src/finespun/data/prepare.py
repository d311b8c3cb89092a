"""Texts → token ids on disk. The second of the two readings: what was kept in the first is tokenized, into files that
the next start of the same run finds again. Only a few rows are in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from finespun.data.formats import Example, Trainable, texts_of
from finespun.data.readers import BadRow, Row
from finespun.data.sources import ERRORS_SHOWN, Source, raise_all
from finespun.data.templates import Encoder, LengthLimit, TokenizedExample, resolve_prompt_format
from finespun.data.texts import HELD_OUT, LEFT_OUT, MADE_BY, TRAIN, Texts
from finespun.data.tokens import Share, TokenStore, TokenWriter
from finespun.errors import DataError
from finespun.files import data_cache, forget_old, hash_of, new_folder
from finespun.recipe import DataRecipe

LONGEST_DEFAULT = 2048
"""Tokens of the longest example where a recipe does not say; a model's context may allow more, memory often not."""

BATCH_CHARACTERS = 1 << 20
BATCH_EXAMPLES = 1024
"""What is tokenized at once: enough for all cores, little for memory."""

FEWEST_FOR_PROCESSES = 4000
MOST_PROCESSES = 8
"""Rows from which on processes are started for the chat template, and how many: more than that, one cannot feed."""


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

    @property
    def drawn(self) -> int:
        """Training examples that an epoch takes."""
        return sum(share.draws for share in self.mixture) or len(self.train)


def encoder_for(texts: Texts, tokenizer: PreTrainedTokenizerBase, recipe: DataRecipe) -> Encoder:
    """How a model with `tokenizer` is prompted with `texts`, which is settled in `recipe` and left in the tokenizer's
    chat template. Raises `DataError` for what does not go together, `ModelError` for a tokenizer without an end."""
    judged = texts.judged
    recipe.prompt_format = resolve_prompt_format(
        tokenizer, judged.shape, recipe.prompt_format, recipe.chat_template, judged.thoughts
    )
    return Encoder(tokenizer, recipe.prompt_format, recipe.train_on)


def settle_lengths(texts: Texts, recipe: DataRecipe, context: int) -> None:
    """Settles in `recipe` the longest example, where it does not say the model's `context`, at most 2048 tokens, and
    what happens to longer ones. Raises `DataError` for a limit beyond the context and for what does not go together."""
    shape = texts.judged.shape
    recipe.max_length = recipe.max_length or min(context, LONGEST_DEFAULT)
    recipe.too_long = recipe.too_long or ("split" if shape == "text" else "refuse")
    if recipe.max_length > context:
        raise DataError(f"data.max_length {recipe.max_length} is longer than the model's context of {context} tokens.")
    if recipe.too_long == "split" and shape != "text":
        raise DataError(
            f"data.too_long split is for texts; the data has the shape {shape}. Choose refuse, cut or skip."
        )
    if recipe.overlap >= recipe.max_length - 1:
        raise DataError(f"data.overlap {recipe.overlap} leaves nothing new in {recipe.max_length} tokens.")


def encode_texts(texts: Texts, encoder: Encoder, recipe: DataRecipe, context: int) -> Tokens:
    """Token ids of all examples within the limit, which is settled in `recipe`. They are kept for the next start of the
    same run. Raises `DataError` as `settle_lengths` does, for examples beyond the limit unless `recipe` says what to do
    with them, for such as the chat template cannot show, and where nothing is left to train."""
    settle_lengths(texts, recipe, context)
    if texts.judged.shape in ("preference", "rated"):
        raise DataError(
            f"The data is {texts.judged.format} data, which fine-tuning on answers does not take. To train on its good "
            "answers alone, make prompt and completion of its columns with data.template."
        )
    folder = data_cache() / "tokens" / _key(texts, encoder, recipe)
    if not (folder / "report.json").is_file():
        forget_old(folder.parent)
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


class Encoded(NamedTuple):
    """A row, what it is, and its token ids; or a `BadRow` that says why it has none."""

    number: int
    row: Row | None
    example: Example | BadRow
    made: list[TokenizedExample] | BadRow


def encoded(texts: Texts, encoder: Encoder) -> Iterator[Encoded]:
    """All rows in their order. While some are tokenized on all cores, the next are read and put into the template."""

    def tokenize(made: list[Any]) -> list[TokenizedExample | BadRow]:
        return encoder.tokenize([sequence for each in made if not isinstance(each, BadRow) for sequence in each])

    with _templating(encoder, len(texts.judged.sides)) as (pool, template, depth), ThreadPoolExecutor(1) as tokenizing:
        examples = (([waiting.kept for waiting in batch], batch) for batch in _batches(texts))
        templated = ((made, (batch, made)) for made, batch in _ahead(pool, template, examples, depth))
        for results, (batch, made) in _ahead(tokenizing, tokenize, templated, 2):
            tokens = iter(results)
            for (number, row, example, _), each in zip(batch, made, strict=True):
                if not isinstance(each, BadRow):
                    parts = [next(tokens) for _ in each]
                    bad = next((part for part in parts if isinstance(part, BadRow)), None)
                    each = bad or [part for part in parts if isinstance(part, TokenizedExample)]
                yield Encoded(number, row, example, each)


class _Waiting(NamedTuple):
    number: int
    row: Row | None
    example: Example | BadRow
    kept: Example | BadRow


def _batches(texts: Texts) -> Iterator[list[_Waiting]]:
    batch: list[_Waiting] = []
    size = 0
    for number, (row, example) in enumerate(texts.rows()):
        reason = texts.judged.reasons.get(number)
        kept = BadRow(example.origin, reason) if reason else example
        if not isinstance(kept, BadRow):
            size += sum(map(len, texts_of(kept)))
        batch.append(_Waiting(number, row, example, kept))
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_EXAMPLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_Template = Callable[[list[Trainable | BadRow]], list[Any]]


@contextmanager
def _templating(encoder: Encoder, rows: int) -> Generator[tuple[Executor, _Template, int]]:
    """Where examples are put into the chat template, by what, and how many batches ahead. Jinja is Python, which uses
    one core a process. A process that has to load all libraries anew, as on other systems than Linux, would take longer
    than it saves."""
    workers = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if sys.platform == "linux" else 1
    if workers == 1 or rows < FEWEST_FOR_PROCESSES:
        with ThreadPoolExecutor(1) as pool:
            yield pool, partial(_sequences, encoder), 1
        return
    gc.freeze()  # a process that is forked shares the memory of this one until something, such as gc, writes there
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin_process, (encoder,)) as pool:
        try:
            yield pool, _sequences_in_process, workers + 1
        finally:
            pool.shutdown(cancel_futures=True)
            gc.unfreeze()


def _sequences(encoder: Encoder, examples: list[Trainable | BadRow]) -> list[Any]:
    return [example if isinstance(example, BadRow) else encoder.sequences(example) for example in examples]


_process_encoder: Encoder


def _begin_process(encoder: Encoder) -> None:
    global _process_encoder
    _process_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one says when to end


def _sequences_in_process(examples: list[Trainable | BadRow]) -> list[Any]:
    return _sequences(_process_encoder, examples)


def _ahead(
    pool: Executor, function: Callable[[Any], Any], items: Iterable[tuple[Any, Any]], depth: int
) -> Iterator[tuple[Any, Any]]:
    """`function` of the first of each two `items`, with the second, in their order; computed up to `depth` ahead."""
    waiting: deque[tuple[Future[Any], Any]] = deque()
    for item, beside in items:
        waiting.append((pool.submit(function, item), beside))
        if len(waiting) > depth:
            done, beside = waiting.popleft()
            yield done.result(), beside
    for done, beside in waiting:
        yield done.result(), beside


def _write_tokens(texts: Texts, encoder: Encoder, recipe: DataRecipe, folder: Path) -> None:
    """Fills `folder` with the token ids of both sides, the rows that were left out, and what the length limit did."""
    assert recipe.max_length is not None
    assert recipe.too_long is not None
    limits = {side: LengthLimit(recipe.max_length, recipe.too_long, recipe.overlap) for side in (TRAIN, HELD_OUT)}
    faults, long, cut = _Faults(), _Faults(), _Faults()
    judged = texts.judged
    starts = judged.starts[: len(texts.sources)]
    dropped = 0
    vocabulary = len(encoder.tokenizer)
    with (
        TokenWriter(folder / "train", vocabulary) as train,
        TokenWriter(folder / "validation", vocabulary) as validation,
        # half a character, for which a row may be left out, is written as JSON's escape for it
        (folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as left_out,
    ):
        for number, row, _, made in encoded(texts, encoder):
            while starts and number >= starts[0]:
                starts.pop(0)
                train.begin_source()
            side = int(judged.sides[number])
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
                place = judged.places[number]
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
        f"{both} of {judged.count(TRAIN) + judged.count(HELD_OUT)} examples are longer than data.max_length "
        f"{recipe.max_length}; the longest has {longest} tokens.",
    )
    cut.refuse("Raise data.max_length, shorten these prompts, or leave the examples out with data.too_long skip.")
    report = {"lengths": asdict(limits[TRAIN]), "dropped": dropped}
    if not len(TokenStore(folder / "train")):
        raise DataError(
            f"All {judged.count(TRAIN)} examples are longer than data.max_length {recipe.max_length}, and "
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
    """A hash of all that token ids depend on: data, what was decided about it, settings, tokenizer."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hash_of(
        [
            MADE_BY,
            texts.files,
            [part.shown for source in (*texts.sources, *texts.held_out_sources) for part in source.parts],
            texts.judged.starts,
            hashlib.sha256(texts.judged.sides.tobytes()).hexdigest(),
            recipe.model_dump(exclude={"source", "validation"}),
            vocabulary,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            encoder.prompt_format,
        ]
    )
