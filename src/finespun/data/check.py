"""What the texts of a run are and what is wrong with them, counted over all rows, with the places, before any training.

A row stays where it is: what is found is said, with the setting that acts on it.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from finespun.data.formats import Example, prompt_and_answer
from finespun.data.prepare import LONGEST_DEFAULT, Encoded, encoded
from finespun.data.quality import (
    NearDuplicateExamples,
    Overlap,
    damage,
    is_echo,
    is_single_word,
    language,
    personal_data,
)
from finespun.data.readers import BadRow, Origin
from finespun.data.templates import Encoder
from finespun.data.texts import HELD_OUT, LEFT_OUT, TRAIN, Texts, kind_of
from finespun.files import CACHE_DAYS, data_cache, write_text

PLACES_KEPT = 50
"""Rows of each finding that are named; the others are counted."""

LANGUAGES_OF = 2_000
"""Rows of which the language is told, spread evenly: it takes longer than all else."""

NEAR_DUPLICATES_OF = 200_000
"""Rows among which near-duplicates are looked for: they take 2 to 4 kB of memory each."""

NGRAM = 13
CONTAMINATED = 0.5
"""A held-out answer counts as contaminated when so much of its n-grams stands in training answers. GPT-3 (Brown et al.
2020, appendix C) took a single n-gram of 13 words; in templated answers that is nearly every one."""

BARS = 40

Severity = Literal["stops", "misleads", "look"]
"""Training refuses it; it trains or measures the wrong thing; it may be meant."""

_ORDER = get_args(Severity)


@dataclass
class Finding:
    """Something in the data that a person should know: how many rows have it, of how many, and where the first are."""

    title: str
    remedy: str
    severity: Severity
    count: int = 0
    of: int = 0
    places: list[tuple[Origin, str]] = field(default_factory=list)

    def add(self, origin: Origin, detail: str = "") -> None:
        """One more row; `detail` is what it has."""
        self.count += 1
        if len(self.places) < PLACES_KEPT:
            self.places.append((origin, detail))


class Limit(NamedTuple):
    """What a `max_length` would do: examples longer than it, and the tokens beyond it."""

    max_length: int
    longer: int
    beyond: int


@dataclass
class Lengths:
    """Lengths of the examples that would be trained, in tokens, or in characters where no model was given."""

    unit: Literal["tokens", "characters"]
    total: int
    trained: int
    median: int
    p95: int
    longest: int
    counts: list[int]
    """Examples in each bar of a histogram, whose `edges` are one more."""
    edges: list[float]
    limits: list[Limit]

    @property
    def examples(self) -> int:
        return sum(self.counts)

    @classmethod
    def of(cls, lengths: NDArray[np.int64], trained: int, unit: Literal["tokens", "characters"]) -> Lengths:
        longest = int(lengths.max())
        counts, edges = np.histogram(lengths, bins=min(BARS, len(np.unique(lengths))), range=(0, longest))
        limits = []
        for power in range(6, longest.bit_length() + 1) if unit == "tokens" else ():
            beyond = lengths[lengths > 1 << power] - (1 << power)
            limits.append(Limit(1 << power, len(beyond), int(beyond.sum())))
        median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
        return cls(unit, int(lengths.sum()), trained, median, p95, longest, counts.tolist(), edges.tolist(), limits)


@dataclass
class Check:
    """The outcome of a check. Lengths and findings are of the rows that are kept; `left_out` counts the rows that
    cleaning leaves out, by their reasons."""

    files: dict[str, str]
    how: list[str]
    format: str
    read: int
    train: int
    held_out: int
    left_out: dict[str, int]
    lengths: Lengths | None
    max_length: int | None
    languages: dict[str, int]
    """Rows in each language, by ISO 639-1 code; "" where it cannot be told."""
    findings: list[Finding]
    remarks: list[str]
    """What was not looked at in all rows."""

    @property
    def stops(self) -> bool:
        """Whether training would refuse this data as it is."""
        return any(finding.severity == "stops" for finding in self.findings)


def check_texts(
    texts: Texts,
    encoder: Encoder | None = None,
    max_length: int | None = None,
    refused: bool = True,
    on_row: Callable[[int], None] = lambda done: None,
) -> Check:
    """Looks at each row of `texts`, which were read with `on_bad_row` "skip", so that bad rows are a finding like
    others. With an `encoder`, lengths are in tokens and what is trained is verified; examples longer than `max_length`
    are then a finding, and one that stops training if they are `refused`. `on_row` is called now and then with the
    number of rows looked at. Raises `DataError` as reading does."""
    return _Look(texts, encoder, max_length or LONGEST_DEFAULT, refused).through(on_row)


class _Look:
    """One pass through all rows, and what it collects."""

    def __init__(self, texts: Texts, encoder: Encoder | None, max_length: int, refused: bool) -> None:
        self.texts, self.encoder, self.max_length, self.refused = texts, encoder, max_length, refused
        judged = texts.judged
        self.total = len(judged.sides)
        self.repeats = dict(judged.repeats())
        self.seen = set(judged.seen_in_training(judged.contents).tolist())
        self.asked = set(judged.seen_in_training(judged.prompts).tolist())
        self.near = NearDuplicateExamples()
        self.near_of: dict[int, int] = {}
        """For a held-out row the training row that is nearly the same; `alike`: the held-out one that is."""
        self.alike: dict[int, int] = {}
        self.keys = array("q")
        self.lengths, self.trained = array("q"), 0
        self.languages: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.findings: dict[str, Finding] = {}
        self.overlap: Overlap | None = None
        self.held: list[int] = []

    def through(self, on_row: Callable[[int], None]) -> Check:
        judged = self.texts.judged
        if judged.count(HELD_OUT):
            self.overlap = Overlap(self._held_out_answers(), NGRAM)
        step = max(1, self.total // LANGUAGES_OF)
        for number, _, example, made in self._rows():
            if number % 500 == 0:
                on_row(number)
            if isinstance(example, BadRow):
                self._find("unusable", example.origin, example.reason)
            elif judged.sides[number] == LEFT_OUT:
                self.left_out[kind_of(judged.reasons[number])] += 1
            else:
                self._measure(example, made)
                self._look_at(number, example, number % step == 0)
        self._look_across()
        lengths = None
        if self.lengths:
            unit = "tokens" if self.encoder else "characters"
            lengths = Lengths.of(np.array(self.lengths, np.int64), self.trained, unit)
        of = {"held": judged.count(HELD_OUT), "train": judged.count(TRAIN), "all": self.total}
        for name, finding in self.findings.items():
            finding.of = of[_FINDINGS[name][3]]
        remarks = []
        if step > 1:
            remarks.append(f"Languages are those of one row in {step}.")
        if len(self.keys) >= NEAR_DUPLICATES_OF:
            remarks.append(f"Near-duplicates were looked for among the first {NEAR_DUPLICATES_OF:,} rows.")
        return Check(
            self.texts.files,
            self.texts.how,
            judged.format,
            self.total,
            of["train"],
            of["held"],
            dict(self.left_out.most_common()),
            lengths,
            self.max_length if self.encoder else None,
            dict(self.languages.most_common()),
            sorted(
                (self.findings[name] for name in _FINDINGS if name in self.findings),
                key=lambda finding: _ORDER.index(finding.severity),
            ),
            remarks,
        )

    def _find(self, name: str, origin: Origin, detail: str = "") -> None:
        title, remedy, severity, _ = _FINDINGS[name]
        if name == "too long" and self.refused:
            severity = "stops"
        self.findings.setdefault(name, Finding(title, remedy, severity)).add(origin, detail)

    def _held_out_answers(self) -> Iterator[str]:
        """Also takes the held-out examples as the first among which near-duplicates are looked for."""
        for number, example in self.texts.examples(HELD_OUT):
            prompt, answer = prompt_and_answer(example)
            self.held.append(number)
            if (like := self._nearest(prompt, answer, number)) is not None:
                self.alike[number] = like
            yield answer

    def _nearest(self, prompt: str, answer: str, number: int) -> int | None:
        """The number of an earlier row that is nearly the same."""
        if len(self.keys) >= NEAR_DUPLICATES_OF:
            return None
        self.keys.append(number)
        like = self.near.first_like(prompt, answer, len(self.keys) - 1)
        return None if like is None else self.keys[like]

    def _rows(self) -> Iterator[Encoded]:
        if self.encoder:
            yield from encoded(self.texts, self.encoder)
        else:
            for number, (row, example) in enumerate(self.texts.rows()):
                yield Encoded(number, row, example, [])

    def _measure(self, example: Example, made: object) -> None:
        if self.encoder is None:
            prompt, answer = prompt_and_answer(example)
            self.lengths.append(len(prompt) + len(answer))
            self.trained += len(answer)
        elif isinstance(made, BadRow):
            self._find("unverified", example.origin, made.reason)
        elif isinstance(made, list):
            for tokens in made:
                self.lengths.append(len(tokens.input_ids))
                self.trained += tokens.trained_tokens
            if (longest := max(len(tokens.input_ids) for tokens in made)) > self.max_length:
                self._find("too long", example.origin, f"{longest:,} tokens")

    def _look_at(self, number: int, example: Example, tell_language: bool) -> None:
        origin = example.origin
        prompt, answer = prompt_and_answer(example)
        whole = f"{prompt}\n{answer}"
        if is_single_word(answer):
            self._find("single word", origin, repr(answer.strip()))
        if is_echo(prompt, answer):
            self._find("echo", origin, repr(answer.strip()[:60]))
        for kind in damage(whole):
            self._find(kind, origin)
        kinds: dict[str, list[str]] = {}
        for found in personal_data(whole):
            kinds.setdefault(found.kind, []).append(_masked(whole[found.start : found.end]))
        for kind, pieces in kinds.items():
            self._find(kind, origin, ", ".join(pieces[:3]) + (f" and {len(pieces) - 3} more" if pieces[3:] else ""))
        if tell_language:
            self.languages[language(answer) or ""] += 1
        if self.texts.judged.sides[number] == TRAIN:
            if self.overlap:
                self.overlap.add(answer)
            self._compare(number, origin, prompt, answer)

    def _compare(self, number: int, origin: Origin, prompt: str, answer: str) -> None:
        places = self.texts.judged.places
        if (first := self.repeats.get(number)) is not None:
            self._find("repeat", origin, f"as {places[first]}")
            return
        like = self._nearest(prompt, answer, number)
        if like is None:
            return
        if self.texts.judged.sides[like] == HELD_OUT:
            if like in self.near_of:  # so it is nearly the same as that training row, too
                self._find("near repeat", origin, f"as {places[self.near_of[like]]}")
            else:
                self.near_of[like] = number
        else:
            self._find("near repeat", origin, f"as {places[like]}")

    def _look_across(self) -> None:
        """What can be said of the held-out rows only when all training rows have been seen."""
        places = self.texts.judged.places
        shares = self.overlap.shares() if self.overlap else []
        for number, share in zip(self.held, shares, strict=True):
            origin = places[number]
            if number in self.seen:
                self._find("held-out repeat", origin)
            elif (near := self.near_of.get(self.alike.get(number, number))) is not None:
                self._find("held-out near repeat", origin, f"as {places[near]}")
            elif number in self.asked:
                self._find("held-out prompt", origin)
            if number not in self.seen and share >= CONTAMINATED:
                self._find("contamination", origin, f"{share:.0%} of them")


def remember(files: dict[str, str]) -> None:
    """Writes down which state of `files`, by their paths, was checked."""
    place = _record()
    now = time.time()
    known = {path: seen for path, seen in _remembered().items() if seen[1] > now - CACHE_DAYS * 24 * 3600}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps(known | {path: (digest, now) for path, digest in files.items()}))


def changed_since_check(files: dict[str, str]) -> list[str]:
    """A line for each of `files` that was another one when it was last checked; none for those that never were."""
    known = _remembered()
    changed = {path: known[path][1] for path, digest in files.items() if path in known and known[path][0] != digest}
    return [
        f"{path} has changed since it was checked ({datetime.fromtimestamp(when):%Y-%m-%d %H:%M}): check it again"
        for path, when in changed.items()
    ]


def _record() -> Path:
    return data_cache() / "checked.json"


def _remembered() -> dict[str, tuple[str, float]]:
    """For each file that was checked its SHA-256 then, and when that was."""
    return json.loads(_record().read_text(encoding="utf-8")) if _record().is_file() else {}


def _masked(piece: str) -> str:
    """Enough of a piece of personal data to find it by, not enough to use it."""
    return piece[:3] + "…" + (piece[-2:] if len(piece) > 8 else "")


_HELD_APART = (
    "Validation on them flatters. Of a held-out share, data.clean.deduplicate near keeps one; else remove them."
)
_MEND = "data.clean.fix_encoding mends them."
_REMOVE = "Remove or replace it: a model can repeat what it was trained on."

_FINDINGS: dict[str, tuple[str, str, Severity, Literal["all", "train", "held"]]] = {
    "unusable": ("rows that cannot be used", "Mend them, or leave them out: data.on_bad_row skip.", "stops", "all"),
    "unverified": (
        "examples of which it cannot be shown what is trained",
        "Mend them, leave them out (data.on_bad_row skip), or choose another data.chat_template or model.",
        "stops",
        "all",
    ),
    "too long": (
        "examples longer than data.max_length",
        "Say with data.too_long what happens to them, or raise data.max_length.",
        "look",
        "all",
    ),
    "held-out repeat": ("held-out examples that are also trained", _HELD_APART, "misleads", "held"),
    "held-out near repeat": ("held-out examples nearly the same as a trained one", _HELD_APART, "misleads", "held"),
    "held-out prompt": (
        "held-out prompts that are also trained, with other answers",
        "data.group_by, with the column of the prompt, keeps them on one side.",
        "look",
        "held",
    ),
    "contamination": (
        f"held-out answers of which half the {NGRAM}-word sequences are in training answers",
        _HELD_APART,
        "misleads",
        "held",
    ),
    "repeat": (
        "rows that say the same as an earlier one",
        "data.clean.deduplicate exact leaves them out.",
        "look",
        "train",
    ),
    "near repeat": (
        "rows that say nearly the same as an earlier one",
        "data.clean.deduplicate near leaves them out.",
        "look",
        "train",
    ),
    "single word": ("answers of a single word", "If they are not meant: data.clean.min_characters.", "look", "all"),
    "echo": (
        "answers that only repeat the prompt",
        "Check data.columns: is the answer in another column?",
        "look",
        "all",
    ),
    "mojibake": ("texts decoded wrongly (mojibake)", _MEND, "misleads", "all"),
    "replacement character": (
        "texts with the replacement character U+FFFD",
        "What stood there is lost: get the texts again.",
        "misleads",
        "all",
    ),
    "invisible characters": ("texts with invisible characters", _MEND, "look", "all"),
    "unfilled placeholder": (
        "texts with an unfilled placeholder, such as {{name}}",
        "Fill them in, or leave the rows out with data.clean.drop_matching.",
        "misleads",
        "all",
    ),
    "secret": ("texts with what looks like a password or key", _REMOVE, "misleads", "all"),
    "card number": ("texts with a card number", _REMOVE, "misleads", "all"),
    "identity number": ("texts with an identity number", _REMOVE, "misleads", "all"),
    "e-mail address": ("texts with an e-mail address", _REMOVE, "look", "all"),
    "phone number": ("texts with a phone number", _REMOVE, "look", "all"),
}
"""Title, remedy, severity, and of which rows it is counted; in the order in which they are told."""
