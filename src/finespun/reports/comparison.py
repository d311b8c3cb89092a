"""A comparison as a page and on a terminal, with what a judging model said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finespun.reports.figures import aligned, between, count, date, figure, percent, share
from finespun.reports.page import turns, write_page

if TYPE_CHECKING:
    from finespun.evaluation.comparison import Comparison, Difference
    from finespun.evaluation.llm_judge import Judged, Judgement
    from finespun.evaluation.perplexity import Interval
    from finespun.evaluation.systems import Compared


def write_comparison(page: Path, compared: Compared) -> None:
    """Writes the page of a comparison. Raises `RunError` where the disk does not take it."""
    comparison, judgement = compared.comparison, compared.judgement
    names = list(comparison.systems)
    pairs = []
    for place, (first, second) in enumerate(comparison.pairs):
        judged = judgement.pairs[place] if judgement else None
        pairs.append(
            {
                "first": names[first],
                "second": names[second],
                "rows": comparison_rows(comparison, first, second),
                "judge": _judge_lines(names, judged) if judged else [],
                "groups": _furthest(comparison, first, second, judged),
            }
        )
    view = {
        "names": names,
        "compared": date(datetime.now()),
        "headline": comparison_headline(comparison),
        "examples": comparison.examples,
        "comparison": comparison,
        "pairs": pairs,
        "judgement": judgement,
        "notes": compared.notes,
    }
    write_page(page, "comparison.html.j2", view)


def comparison_lines(compared: Compared) -> list[str]:
    """What a comparison found, for a terminal."""
    comparison, judgement = compared.comparison, compared.judgement
    names = list(comparison.systems)
    lines = list(compared.notes)
    for place, (first, second) in enumerate(comparison.pairs):
        table = [["", names[first], names[second], "difference", "95 % interval", "win/tie/loss", "p (Holm)", ""]]
        columns = ("name", "first", "second", "difference", "interval", "wins", "p", "verdict")
        table += [[row[column] for column in columns] for row in comparison_rows(comparison, first, second)]
        lines += [
            "",
            f"{names[second]} beside {names[first]}, {count(comparison.examples)} examples",
            *aligned(table),
        ]
        if judgement:
            lines += _judge_lines(names, judgement.pairs[place])
    if judgement:
        lines += ["", *_judge_costs(judgement)]
    return [*lines, "", comparison_headline(comparison)]


def comparison_rows(comparison: Comparison, first: int, second: int) -> list[dict[str, Any]]:
    """Two systems beside each other in words, metric by metric."""
    names = list(comparison.systems)
    rows = []
    for scores in comparison.scores:
        difference = next(
            each
            for each in comparison.differences
            if (each.metric, each.first, each.second) == (scores.metric, first, second)
        )
        wins, value = difference.wins, difference.value
        reach = max(abs(value.low), abs(value.high)) if math.isfinite(value.high - value.low) else 0.0
        rows.append(
            {
                "name": scores.metric,
                "better": scores.better or "",
                "signature": scores.signature,
                "first": figure(scores.systems[first].value),
                "second": figure(scores.systems[second].value),
                "intervals": [between(each.low, each.high) for each in (scores.systems[first], scores.systems[second])],
                "difference": figure(value.value, signed=True),
                "interval": between(value.low, value.high, signed=True),
                "bar": [50 + 48 * bound / reach for bound in (value.low, value.value, value.high)] if reach else None,
                "wins": f"{count(wins.wins)}/{count(wins.ties)}/{count(wins.losses)}" if wins else "–",
                "rate": _rate(wins.rate) if wins else "–",
                "p": _p(difference.p_corrected),
                "p_randomization": _p(difference.p_randomization),
                "p_resampled": _p(difference.p_resampled),
                "verdict": _verdict(difference, names),
                "shown": difference.shown,
            }
        )
    return rows


def comparison_headline(comparison: Comparison) -> str:
    """What a comparison comes to, in a sentence."""
    names = list(comparison.systems)
    judged = [difference for difference in comparison.differences if difference.better]
    ahead = Counter(names[each.ahead] for each in judged if each.ahead is not None)
    if len(names) > 2:
        any_two = f"between any two of the {len(names)} systems"
        shown = f"Of {count(len(judged))} differences {any_two}, {count(ahead.total())} are shown"
        return shown if ahead else f"No difference shown {any_two}"
    if not ahead:
        return f"No difference shown between {names[0]} and {names[1]}"
    if len(ahead) == 1:
        ((name, number),) = ahead.items()
        other = names[1 - names.index(name)]
        every = f"all {len(judged)}" if number == len(judged) > 1 else f"{number} of {len(judged)}"
        return f"{name} is better than {other} in {every} metric{'' if len(judged) == 1 else 's'}"
    return f"Of {len(judged)} metrics, " + " and ".join(f"{name} is better in {ahead[name]}" for name in names[::-1])


def _verdict(difference: Difference, names: Sequence[str]) -> str:
    if not difference.shown:
        return "no difference shown"
    if difference.ahead is not None:
        return f"{names[difference.ahead]} is better"
    return f"{names[difference.second]} is {'higher' if difference.value.value > 0 else 'lower'}"


def _judge_lines(names: Sequence[str], judged: Judged) -> list[str]:
    """What a judging model says of two systems."""
    wins, rate = judged.wins, judged.wins.rate
    first, second = names[judged.first], names[judged.second]
    counts = Counter(judged.outcomes.values())
    decided = wins.wins + wins.ties + wins.losses
    if not decided:
        return [f"The judge gave no verdict on any of {count(len(judged.outcomes))} examples."]
    shown = (
        "no difference shown" if rate.low <= 0.5 <= rate.high else f"{second if rate.value > 0.5 else first} is better"
    )
    identical = f", {count(counts['identical'])} of them identical outputs" if counts["identical"] else ""
    lines = [
        f"Judge: {second} wins {_rate(rate)} of {count(decided)} examples, a tie as half a win "
        f"({count(wins.wins)} won, {count(wins.ties)} tied{identical}, {count(wins.losses)} lost): {shown}."
    ]
    if counts["failed"]:
        lines.append(f"{share(counts['failed'], len(judged.outcomes))} examples have no verdict and are not counted.")
    if judged.agreement is not None:
        kappa = "" if judged.kappa is None else f" (Cohen's kappa {figure(judged.kappa)})"
        place = judged.first_place
        biased = place.low > 0.5 or place.high < 0.5
        side = f" It favours the {'first' if place.value > 0.5 else 'second'} place." if biased else ""
        of_decided = f"; of its decisions {_rate(place)} are for the response shown first" if place.value >= 0 else ""
        lines.append(
            f"Asked in both orders, the judge agrees with itself on {percent(100 * judged.agreement)} of the "
            f"examples{kappa}{of_decided}.{side}"
        )
    return lines


def _judge_costs(judgement: Judgement) -> list[str]:
    """What judging took, and what failed."""
    judge = judgement.judge
    models = [model for model in judgement.models if model != judge.model]
    replied = f" ({', '.join(models)})" if models else ""
    lines = [
        f"Judge {judge.model}{replied} at {judge.url}: "
        f"{count(judgement.questions)} questions, {count(judgement.prompt_tokens)} prompt tokens, "
        f"{count(judgement.completion_tokens)} completion tokens"
        + (f" (not said for {count(judgement.uncounted)} questions)" if judgement.uncounted else "")
    ]
    if judgement.failures:
        lines.append(f"{count(len(judgement.failures))} questions failed; the same command asks them again:")
        lines += [f"    {origin}: {reason}" for origin, reason in judgement.failures[:5]]
    return lines


def _furthest(
    comparison: Comparison, first: int, second: int, judged: Judged | None, most: int = 5
) -> list[dict[str, Any]]:
    """The examples on which two systems differ most, in either direction; where no metric says, the first that do."""
    names = list(comparison.systems)
    outputs = [comparison.systems[names[place]] for place in (first, second)]
    furthest = comparison.furthest(first, second, most)
    if furthest is None:
        differing = [index for index, (a, b) in enumerate(zip(*outputs, strict=True)) if a.text != b.text]
        groups = [("Different outputs", differing[: 2 * most])]
    else:
        groups = [
            (f"{names[place]} furthest ahead", each) for place, each in zip((second, first), furthest, strict=True)
        ]
    return [
        {
            "title": title,
            "samples": [
                {
                    "origin": outputs[0][index].origin,
                    "turns": turns(outputs[0][index].prompt),
                    "references": outputs[0][index].references,
                    "columns": [
                        {
                            "name": names[place],
                            "output": each[index],
                            "scores": _single_scores(comparison, place, index),
                        }
                        for place, each in zip((first, second), outputs, strict=True)
                    ],
                    "judged": _outcome(judged, index, names) if judged else None,
                }
                for index in indices
            ],
        }
        for title, indices in groups
        if indices
    ]


def _single_scores(comparison: Comparison, system: int, example: int) -> list[tuple[str, str]]:
    """Those of an example that are not the same for all systems."""
    return [
        (scores.metric, figure(scores.per_example[system, example]))
        for scores in comparison.scores
        if scores.per_example is not None and np.ptp(scores.per_example[:, example]) > 0
    ]


def _outcome(judged: Judged, example: int, names: Sequence[str]) -> str | None:
    said = {
        "first": f"judge: {names[judged.first]} is better",
        "second": f"judge: {names[judged.second]} is better",
        "tie": "judge: a tie",
        "failed": "judge: no verdict",
    }
    return said.get(judged.outcomes.get(example, ""))


def _rate(rate: Interval) -> str:
    """A share with its interval, in percent."""
    low, high = (f"{100 * bound:.0f}" for bound in (rate.low, rate.high))
    return f"{100 * rate.value:.0f} % ({low} to {high} %)"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
