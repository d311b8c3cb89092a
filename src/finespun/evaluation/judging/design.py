"""The plan of a study: who judges which items, in which order, with which text on which side.

Everything is drawn from one generator, so a seed gives one plan. What is balanced is balanced by construction, not on
average: the loads of annotators, the number of annotators an item has, and how often each model stands at each place.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

from pydantic.dataclasses import dataclass

Kind = Literal["practice", "real", "known", "repeated"]

FEWEST_UNITS = 6
"""Different words (or characters) that a text needs for it to be plain that they are out of order."""


@dataclass(frozen=True)
class Task:
    """One item as one annotator gets it. `order[k]` is the candidate that stands at place k."""

    item: int
    order: tuple[int, ...]
    kind: Kind


def assign(
    sizes: Sequence[int], kinds: Sequence[Hashable], annotators: int, overlap: int, rng: random.Random
) -> list[list[int]]:
    """For each annotator the units (by their position in `sizes`) that they judge; each unit has `overlap` different
    annotators, or all where there are fewer.

    `sizes` says how many items a unit is, `kinds` what it compares. The loads of two annotators differ by no more than
    the largest size. Among the least loaded, whoever has fewest of the kind is taken, and whoever has judged least
    together with those already taken, so that as many pairs of people as possible can be compared.
    """
    units: list[list[int]] = [[] for _ in range(annotators)]
    load: Counter[int] = Counter()
    load_of_kind: Counter[tuple[int, Hashable]] = Counter()
    together: Counter[frozenset[int]] = Counter()
    for unit in rng.sample(range(len(sizes)), len(sizes)):
        chosen: list[int] = []
        for _ in range(min(overlap, annotators)):
            free = [person for person in range(annotators) if person not in chosen]
            rng.shuffle(free)
            best = min(
                free,
                key=lambda person: (
                    load[person],
                    load_of_kind[person, kinds[unit]],
                    sum(together[frozenset((person, other))] for other in chosen),
                ),
            )
            together.update(frozenset((best, other)) for other in chosen)
            chosen.append(best)
        for person in chosen:
            units[person].append(unit)
            load[person] += sizes[unit]
            load_of_kind[person, kinds[unit]] += 1
    return units


def balanced_orders(groups: Sequence[tuple[Hashable, ...]], rng: random.Random) -> list[tuple[int, ...]]:
    """An order for each group of models that stand side by side: how often a model of equal groups stands at two places
    differs by one at most (each run of as many groups as there are places is a Latin square)."""
    waiting: dict[tuple[Hashable, ...], list[tuple[int, ...]]] = defaultdict(list)
    orders = []
    for group in groups:
        if not waiting[group]:
            places = len(group)
            base = rng.sample(range(places), places)
            waiting[group] = [tuple(base[turn:] + base[:turn]) for turn in range(places)]
            rng.shuffle(waiting[group])
        orders.append(waiting[group].pop())
    return orders


def plan(
    real: Sequence[tuple[int, tuple[Hashable, ...]]],
    controls: Sequence[tuple[int, int]],
    practice: int,
    known: int,
    repeated: int,
    rng: random.Random,
) -> tuple[Task, ...]:
    """The tasks of one annotator. `real` are the items to judge with the models that stand in them, `controls` the
    items with a known answer and the number of their texts.

    Practice comes first. Known answers are spread over the rest; items come a second time in its second half, their
    places reversed, and are taken from its first third, so that nobody judges the same twice in a row.
    """
    shuffled = rng.sample(list(real), len(real))
    orders = balanced_orders([models for _, models in shuffled], rng)
    count = len(shuffled)
    tasks = [
        (float(at), Task(item, order, "real"))
        for at, ((item, _), order) in enumerate(zip(shuffled, orders, strict=True))
    ]
    repeated = min(repeated, count // 3)
    for number, at in enumerate(rng.sample(range(count // 3), repeated)):
        original = tasks[at][1]
        place = count / 2 + (number + rng.random()) / repeated * count / 2
        tasks.append((place, Task(original.item, original.order[::-1], "repeated")))

    drawn = [controls[number % len(controls)] for number in range(practice + known)] if controls else []
    sides = balanced_orders([tuple(range(places)) for _, places in drawn], rng)
    checks = [(item, side) for (item, _), side in zip(drawn, sides, strict=True)]
    for number, (item, side) in enumerate(checks[practice:]):
        tasks.append(((number + rng.random()) / known * count, Task(item, side, "known")))
    first = [Task(item, side, "practice") for item, side in checks[:practice]]
    return (*first, *(task for _, task in sorted(tasks, key=lambda placed: placed[0])))


def scrambled(text: str, rng: random.Random) -> str | None:
    """`text` with its words in random order, or its characters where it has few words or is written without spaces;
    None where it has too few of them for anybody to notice."""
    words = text.split()
    letters = [letter for letter in text if not letter.isspace()]
    dense = sum("\u3040" <= letter <= "\u9fff" for letter in letters) > len(letters) / 3
    units, between = (letters, "") if dense or len(set(words)) < FEWEST_UNITS else (words, " ")
    if len(set(units)) < FEWEST_UNITS:
        return None
    mixed = rng.sample(units, len(units))
    return None if mixed == units else between.join(mixed)
