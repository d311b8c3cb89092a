"""What people's answers come to: preferences with intervals, strengths, agreement, attention.

People who judge one example, and the judgements of one example, are not independent; what can be is resampled by whole
examples.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from finespun.errors import FinespunError
from finespun.evaluation.judging.answers import Answer
from finespun.evaluation.judging.design import Task
from finespun.evaluation.judging.store import Event, progress
from finespun.evaluation.judging.study import Candidate, Item, Study

NORMAL_95 = 1.959963984540054
"""Standard deviations of a normal distribution between which 95 % of it lie."""

PRIOR = 0.5
"""Judgements that are added to both sides of each pair of models (Haldane–Anscombe): a model that won each time is
strong, not infinitely so."""

DRAWS = 1000
"""Resamples of a bootstrap."""

SEED = 20030815
"""Of resampling: results are the same each time. A number of its own, as resamples are not random to data that was
simulated with the same one."""

SURE = 0.98
"""The share of resamples in which a model has to be the strongest to be called so: 0.975 is a two-sided test at 5 %,
and resamples vary somewhat less than examples do."""

FEWEST_EXAMPLES = 10
"""Resamples of fewer examples than these say too little about what other examples would have given for an interval."""

ENOUGH_EXAMPLES = 20
"""From so many examples on, resamples alone call chance a preference no more often than an exact test at 5 % would."""

MOST_SHOWN = 10
"""Examples that are listed as deciding or as contested."""


@dataclass(frozen=True)
class Judgement:
    """An answer that stands."""

    annotator: int
    position: int
    task: Task
    item: Item
    answer: Answer
    at: str

    def texts(self, places: Iterable[int]) -> list[int]:
        """The candidates that stood at `places`."""
        return [self.task.order[place] for place in places]


@dataclass(frozen=True)
class Vote:
    """One person's comparison of two texts for one example: 1 for the first, -1 for the second, 0 for neither."""

    example: int
    item: Item
    annotator: int
    first: Candidate
    second: Candidate
    outcome: int
    both_bad: bool = False


@dataclass(frozen=True)
class Pair:
    """Two models in comparison. `rate` is the share of `wins` among the judgements that prefer one, with its 95 %
    interval (Wilson 1927), None where there is none."""

    first: int
    second: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    same_text: int
    rate: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Strength:
    """A model's strength by Bradley and Terry (1952) as log-odds, of mean 0 over all: a model that is stronger by 1 is
    preferred in 73 % of comparisons. The 95 % interval, and the share of resamples in which the model is the
    strongest, are from a bootstrap over examples; there is no interval where the examples are few or all say the
    same."""

    model: int
    value: float
    low: float | None
    high: float | None
    strongest: float


@dataclass(frozen=True)
class Mean:
    """A model's mean mark by one criterion with its 95 % interval (bootstrap over examples), where there are enough
    examples for one."""

    model: int
    criterion: str
    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha of what was asked: 1 is agreement, 0 what chance gives; None where nothing was judged twice
    or all said the same."""

    of: str
    level: str
    alpha: float | None
    units: int


@dataclass(frozen=True)
class Contested:
    """The share of pairs of annotators who agree on an item (for marks: 1 less the mean distance in parts of the
    scale)."""

    item: Item
    agreement: float
    annotators: int


@dataclass(frozen=True)
class Deciding:
    """How much the lead of the strongest model over the second (in log-odds) owes to one example."""

    example: int
    item: Item
    influence: float
    wins: float
    losses: float


@dataclass(frozen=True)
class Worker:
    """How an annotator judges. `first` is the share of preferences for the text that stood first."""

    number: int
    done: int
    total: int
    known_right: int
    known: int
    repeated_same: int
    repeated: int
    median_seconds: float | None
    first: float | None
    last_at: str | None


@dataclass(frozen=True)
class Results:
    """All of it. `flips` is how many examples, those that speak most for the strongest model, have to be left out for
    the second to draw level; None where there is no lead."""

    study: Study
    judgements: list[Judgement]
    votes: list[Vote]
    pairs: list[Pair]
    strengths: list[Strength]
    preferred: int | None
    means: list[Mean]
    agreement: list[Agreement]
    contested: list[Contested]
    deciding: list[Deciding]
    flips: int | None
    workers: list[Worker]
    median_seconds: float | None
    without: tuple[int, ...]


def analyse(study: Study, events: Sequence[Event], without: Collection[int] = (), draws: int = DRAWS) -> Results:
    """The results of all that was judged so far, but for the annotators (by position) in `without`."""
    everybody = read_judgements(study, events)
    counted = [one for one in everybody if one.task.kind == "real" and one.annotator not in without]
    votes = read_votes(study, counted)
    examples, wins = win_counts(votes, len(study.models))
    strengths = bradley_terry(wins, draws) if len(study.models) > 1 and votes else []
    deciding, flips = _deciding(examples, wins, strengths, votes) if strengths else ([], None)
    seconds = [one.answer.seconds for one in counted if one.answer.seconds is not None]
    return Results(
        study,
        everybody,
        votes,
        _pairs(study, votes),
        strengths,
        preferred_model(wins, strengths) if strengths else None,
        _means(study, counted, draws),
        _agreement(study, counted, votes),
        _contested(study, counted),
        deciding,
        flips,
        [
            _worker(study, number, [one for one in everybody if one.annotator == number])
            for number in range(len(study.annotators))
        ],
        statistics.median(seconds) if seconds else None,
        tuple(sorted(without)),
    )


def read_judgements(study: Study, events: Sequence[Event]) -> list[Judgement]:
    """The answers that stand, to items of all kinds."""
    by_annotator: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_annotator[event.annotator].append(event)
    found = []
    for annotator, theirs in sorted(by_annotator.items()):
        tasks = study.annotators[annotator].tasks
        at = {event.position: event.at for event in theirs if event.kind == "answer"}
        for position, answer in progress(theirs, len(tasks)).answers.items():
            task = tasks[position]
            found.append(Judgement(annotator, position, task, study.items[task.item], answer, at[position]))
    return found


def read_votes(study: Study, judgements: Iterable[Judgement]) -> list[Vote]:
    """Judgements as comparisons of two texts: a ranking is one for each two of its texts, and so are one person's marks
    for the texts of an example (by their mean)."""
    votes = []
    if study.method == "rating":
        groups: dict[tuple[int, int], list[Judgement]] = defaultdict(list)
        for one in judgements:
            groups[one.annotator, one.item.example].append(one)
        for (annotator, example), group in groups.items():
            for a, b in itertools.combinations(group, 2):
                difference = _mark(study, a.answer) - _mark(study, b.answer)
                outcome = 0 if abs(difference) < 1e-9 else int(math.copysign(1, difference))
                votes.append(Vote(example, a.item, annotator, a.item.candidates[0], b.item.candidates[0], outcome))
        return votes
    for one in judgements:
        if study.method == "pairs":
            outcome = _preference(one)
            bad = one.answer.choice == "bad"
            votes.append(Vote(one.item.example, one.item, one.annotator, *one.item.candidates, outcome, bad))
        else:
            best_first = one.texts(one.answer.ranking or ())
            for a, b in itertools.combinations(range(len(one.item.candidates)), 2):
                outcome = 1 if best_first.index(a) < best_first.index(b) else -1
                first, second = one.item.candidates[a], one.item.candidates[b]
                votes.append(Vote(one.item.example, one.item, one.annotator, first, second, outcome))
    return votes


def _preference(one: Judgement) -> int:
    """1 where the item's first candidate is preferred, wherever it stood, -1 for the second, 0 for neither."""
    place = {"first": 0, "second": 1}.get(one.answer.choice or "")
    return 0 if place is None else (1 if one.task.order[place] == 0 else -1)


def _mark(study: Study, answer: Answer) -> float:
    """The mean mark, each scale from 0 to 1."""
    marks = answer.marks or {}
    return statistics.fmean((marks[one.name] - 1) / (len(one.points) - 1) for one in study.criteria)


def passes(study: Study, task: Task, answer: Answer) -> bool:
    """Whether an answer to an item with a known answer is the known one: its first candidate is the better; the text of
    a rating gets no more than the middle of the scale."""
    match study.method:
        case "pairs":
            return answer.choice in ("first", "second") and task.order[0 if answer.choice == "first" else 1] == 0
        case "ranking":
            return bool(answer.ranking) and task.order[answer.ranking[0]] == 0
        case "rating":
            return _mark(study, answer) <= 0.5


def same_again(study: Study, first: Judgement, second: Judgement) -> bool:
    """Whether two answers to one item, its texts at different places, say the same: the same preference, the same text
    as the best, or marks no more than a quarter of the scale apart."""
    match study.method:
        case "pairs":
            decided = [one.answer.choice if not _preference(one) else _preference(one) for one in (first, second)]
            return decided[0] == decided[1]
        case "ranking":
            return first.texts(first.answer.ranking or ())[0] == second.texts(second.answer.ranking or ())[0]
        case "rating":
            return abs(_mark(study, first.answer) - _mark(study, second.answer)) <= 0.25


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927). `count` is at least 1."""
    share, z2 = successes / count, NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_counts(votes: Iterable[Vote], models: int) -> tuple[list[int], NDArray[np.float64]]:
    """The examples there are votes for, and for each how often each model was preferred to each other, `[examples,
    models, models]`; a vote for neither is half a win for both."""
    by_example: dict[int, NDArray[np.float64]] = {}
    for vote in votes:
        counts = by_example.setdefault(vote.example, np.zeros((models, models)))
        for a, b in itertools.product(vote.first.models, vote.second.models):
            counts[a, b] += (1 + vote.outcome) / 2
            counts[b, a] += (1 - vote.outcome) / 2
    examples = sorted(by_example)
    return examples, np.array([by_example[example] for example in examples]).reshape(-1, models, models)


def strengths_of(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """The strengths by Bradley and Terry, `[models]`, of mean 0, that make `wins` `[models, models]` most likely, with
    `PRIOR` added."""
    choix = _needed("choix")
    prior = PRIOR * (1 - np.eye(len(wins)))
    strengths = choix.ilsr_pairwise_dense(wins + prior, max_iter=1000)
    return strengths - strengths.mean()


def bradley_terry(wins: NDArray[np.float64], draws: int = DRAWS) -> list[Strength]:
    """The strength of each model from `wins` `[examples, models, models]`, the strongest first."""
    values = strengths_of(wins.sum(0))
    rng = np.random.default_rng(SEED)
    count = len(wins)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    resampled = np.array([strengths_of(drawn) for drawn in np.tensordot(weights.astype(float), wins, axes=1)])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    best = resampled > resampled.max(1, keepdims=True) - 1e-9
    strongest = (best / best.sum(1, keepdims=True)).mean(0)  # a lead that several share is nobody's alone
    known = (high - low > 1e-9) & (count >= FEWEST_EXAMPLES)
    return [
        Strength(
            int(model),
            float(values[model]),
            float(low[model]) if known[model] else None,
            float(high[model]) if known[model] else None,
            float(strongest[model]),
        )
        for model in np.argsort(-values, kind="stable")
    ]


def sign_test(first: int, second: int) -> float:
    """The probability (two-sided, exact) that of so many examples the sides are at least so uneven by chance."""
    count = first + second
    tail = sum(math.comb(count, successes) for successes in range(max(first, second), count + 1))
    return min(1.0, 2 * tail / 2**count)


def preferred_model(wins: NDArray[np.float64], strengths: Sequence[Strength]) -> int | None:
    """The model that people prefer to the others, if chance does not explain it: it is the strongest in all but few
    resamples, and where examples are few, more of them speak for it than against it in comparison with each other model
    (sign test at 5 %)."""
    first = strengths[0]
    if first.strongest < SURE:
        return None
    for other in strengths[1:] if len(wins) < ENOUGH_EXAMPLES else ():
        balance = wins[:, first.model, other.model] - wins[:, other.model, first.model]
        ahead, behind = int((balance > 1e-9).sum()), int((balance < -1e-9).sum())
        if ahead <= behind or sign_test(ahead, behind) >= 0.05:
            return None
    return first.model


def _pairs(study: Study, votes: Sequence[Vote]) -> list[Pair]:
    counts: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        for a, b in itertools.product(vote.first.models, vote.second.models):
            outcome = vote.outcome if a < b else -vote.outcome
            counts[min(a, b), max(a, b)]["both_bad" if vote.both_bad else ("ties", "wins", "losses")[outcome]] += 1
    pairs = []
    for a, b, same in study.same_text:
        found = counts[a, b]
        decided = found["wins"] + found["losses"]
        low, high = wilson(found["wins"], decided) if decided else (None, None)
        rate = found["wins"] / decided if decided else None
        told = (found[key] for key in ("wins", "losses", "ties", "both_bad"))
        pairs.append(Pair(a, b, *told, same, rate, low, high))
    return pairs


def _means(study: Study, judgements: Sequence[Judgement], draws: int) -> list[Mean]:
    means = []
    for model, criterion in itertools.product(range(len(study.models)), study.criteria):
        by_example: dict[int, list[int]] = defaultdict(list)
        for one in judgements:
            if model in one.item.candidates[0].models and one.answer.marks:
                by_example[one.item.example].append(one.answer.marks[criterion.name])
        if not by_example:
            continue
        sums = np.array([sum(marks) for marks in by_example.values()], dtype=float)
        counts = np.array([len(marks) for marks in by_example.values()], dtype=float)
        weights = np.random.default_rng(SEED).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
        low, high = np.percentile(weights @ sums / (weights @ counts), [2.5, 97.5])
        interval = (float(low), float(high)) if len(sums) >= FEWEST_EXAMPLES else (None, None)
        means.append(Mean(model, criterion.name, float(sums.sum() / counts.sum()), *interval, int(counts.sum())))
    return means


def krippendorff_alpha(ratings: Mapping[tuple[int, int], float], level: str) -> tuple[float | None, int]:
    """Krippendorff's alpha of `ratings` by (annotator, unit), and how many units several annotators have rated."""
    units = Counter(unit for _, unit in ratings)
    shared = [unit for unit, count in units.items() if count > 1]
    annotators = sorted({annotator for annotator, _ in ratings})
    table = np.array([[ratings.get((annotator, unit), np.nan) for unit in shared] for annotator in annotators])
    if not shared or len(np.unique(table[~np.isnan(table)])) < 2:
        return None, len(shared)
    alpha = _needed("krippendorff").alpha(reliability_data=table, level_of_measurement=level)
    return float(alpha), len(shared)


def _agreement(study: Study, judgements: Sequence[Judgement], votes: Sequence[Vote]) -> list[Agreement]:
    if study.method == "rating":
        found = []
        for criterion in study.criteria:
            marks = {
                (one.annotator, one.task.item): one.answer.marks[criterion.name]
                for one in judgements
                if one.answer.marks
            }
            found.append(Agreement(criterion.name, "ordinal", *krippendorff_alpha(marks, "ordinal")))
        return found
    units: dict[tuple[int, str, str], int] = {}
    said = {}
    for vote in votes:
        unit = units.setdefault((vote.example, vote.first.text, vote.second.text), len(units))
        said[vote.annotator, unit] = 2 if vote.both_bad else vote.outcome
    return [Agreement("preference", "nominal", *krippendorff_alpha(said, "nominal"))]


def _contested(study: Study, judgements: Sequence[Judgement]) -> list[Contested]:
    """All items that several annotators have judged, those they agree on least first."""
    by_item: dict[int, list[Judgement]] = defaultdict(list)
    for one in judgements:
        by_item[one.task.item].append(one)
    agree: Callable[[Judgement, Judgement], float]
    match study.method:
        case "pairs":
            agree = lambda a, b: float(same_again(study, a, b))  # noqa: E731
        case "ranking":
            agree = _same_order
        case "rating":
            agree = lambda a, b: 1 - _distance(study, a.answer, b.answer)  # noqa: E731
    found = [
        Contested(group[0].item, statistics.fmean(agree(a, b) for a, b in itertools.combinations(group, 2)), len(group))
        for group in by_item.values()
        if len(group) > 1
    ]
    return sorted(found, key=lambda one: (one.agreement, one.item.example))


def _same_order(a: Judgement, b: Judgement) -> float:
    """The share of pairs of texts that two rankings put into the same order."""
    orders = [one.texts(one.answer.ranking or ()) for one in (a, b)]
    pairs = list(itertools.combinations(range(len(a.item.candidates)), 2))
    return statistics.fmean(
        (orders[0].index(x) < orders[0].index(y)) == (orders[1].index(x) < orders[1].index(y)) for x, y in pairs
    )


def _distance(study: Study, a: Answer, b: Answer) -> float:
    marks = (a.marks or {}, b.marks or {})
    return statistics.fmean(
        abs(marks[0][one.name] - marks[1][one.name]) / (len(one.points) - 1) for one in study.criteria
    )


def _deciding(
    examples: Sequence[int], wins: NDArray[np.float64], strengths: Sequence[Strength], votes: Sequence[Vote]
) -> tuple[list[Deciding], int | None]:
    """Each example's part in the lead of the first model over the second, the largest first; and how many of those that
    speak for the first have to be left out, the largest first, until there is no lead."""
    first, second = strengths[0].model, strengths[1].model
    items: dict[int, Item] = {}
    for vote in votes:  # of an example's items, the one that compares the two
        written = {*vote.first.models, *vote.second.models}
        if vote.example not in items or {first, second} <= written:
            items[vote.example] = vote.item

    def lead(counts: NDArray[np.float64]) -> float:
        values = strengths_of(counts)
        return float(values[first] - values[second])

    total = wins.sum(0)
    whole = lead(total)
    found = [
        Deciding(
            example,
            items[example],
            whole - lead(total - counts),
            float(counts[first, second]),
            float(counts[second, first]),
        )
        for example, counts in zip(examples, wins, strict=True)
    ]
    flips = None
    order = np.argsort([-one.influence for one in found], kind="stable")
    for count, without in enumerate(np.cumsum(wins[order], axis=0), 1):
        if whole > 1e-9 and lead(total - without) <= 1e-9:
            flips = count
            break
    return sorted(found, key=lambda one: -abs(one.influence)), flips


def _worker(study: Study, number: int, judgements: Sequence[Judgement]) -> Worker:
    real = {one.task.item: one for one in judgements if one.task.kind == "real"}
    known = [one for one in judgements if one.task.kind == "known"]
    again = [(real[one.task.item], one) for one in judgements if one.task.kind == "repeated" and one.task.item in real]
    seconds = [
        one.answer.seconds for one in judgements if one.task.kind != "practice" and one.answer.seconds is not None
    ]
    sides = [one.answer.choice for one in real.values() if one.answer.choice in ("first", "second")]
    return Worker(
        number,
        len(judgements),
        len(study.annotators[number].tasks),
        sum(passes(study, one.task, one.answer) for one in known),
        len(known),
        sum(same_again(study, *pair) for pair in again),
        len(again),
        statistics.median(seconds) if seconds else None,
        sides.count("first") / len(sides) if sides else None,
        max((one.at for one in judgements), default=None),
    )


def _needed(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError:
        raise FinespunError(f"The results need the package {package}: pip install 'finespun[judge]'") from None
