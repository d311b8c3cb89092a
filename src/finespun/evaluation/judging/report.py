"""Results for people and for programs: lines for a terminal, the page that shows them live and the one that is kept,
all judgements as JSONL or CSV, judged pairs as preference data."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finespun.errors import DataError, RecipeError
from finespun.evaluation.judging.analysis import MOST_SHOWN, Judgement, Pair, Results, Vote, Worker, analyse
from finespun.evaluation.judging.store import Store
from finespun.evaluation.judging.study import Item, Prompt, Study
from finespun.files import write_jsonl, write_text
from finespun.reports.page import write_page

PAGES = Path(__file__).parent / "pages"

LIVE_DRAWS = 200
"""Resamples of a bootstrap on the page that is made anew with each answer."""

METHODS = {"pairs": "pairs of texts", "ranking": "rankings", "rating": "ratings by criteria"}


def study_results(store: Store, without: Sequence[int] = ()) -> Results:
    """The results so far, but for the annotators with the numbers (from 1) in `without`."""
    return analyse(store.study, store.events(), _positions(store.study, without))


def _positions(study: Study, numbers: Iterable[int]) -> set[int]:
    for number in numbers:
        if not 1 <= number <= len(study.annotators):
            raise RecipeError(f"There is no annotator {number}; they have the numbers 1 to {len(study.annotators)}.")
    return {number - 1 for number in numbers}


def result_lines(results: Results) -> list[str]:
    """The results for a terminal."""
    view = results_view(results)
    lines = [view["headline"], view["basis"]]
    lines += [f"  {pair['text']}" for pair in view["pairs"]]
    if view["strengths"]:
        lines.append(
            "Strength (Bradley–Terry, log-odds; 95 % intervals from a bootstrap over examples, where there are enough)"
        )
        width = max(len(one["model"]) for one in view["strengths"])
        lines += [
            f"  {one['model']:<{width}}  {one['value']}{one['interval']}  strongest in {one['strongest']} of resamples"
            for one in view["strengths"]
        ]
    if view["means"]:
        lines.append("Mean marks (95 % intervals from a bootstrap over examples, where there are enough)")
        lines += [
            f"  {row['model']}: " + ", ".join(f"{name} {cell}" for name, cell in row["cells"].items())
            for row in view["means"]
        ]
    lines.append("Agreement (Krippendorff's alpha)")
    lines += [f"  {one['text']}" for one in view["agreement"]]
    lines.append("Annotators")
    lines += [f"  {one['number']}: {one['text']}" for one in view["workers"]]
    return lines


def write_results(results: Results, page: Path) -> None:
    """Writes the page of the results, one file that needs nothing else. Raises `RunError` where the disk does not take
    it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, "judged.html.j2", results_view(results), PAGES)


class LiveResults:
    """The page with links and results, made anew when something happened."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._made: tuple[int, dict[str, Any]] | None = None

    def view(self, base: str) -> dict[str, Any]:
        """What the page shows; links begin with `base`."""
        with self._lock:
            newest = self._store.last_event()
            if self._made is None or self._made[0] != newest:
                results = analyse(self._store.study, self._store.events(), draws=LIVE_DRAWS)
                self._made = (newest, results_view(results))
            links = [f"{base}/a/{one.token}" for one in self._store.study.annotators]
            return self._made[1] | {"links": links}


def results_view(results: Results) -> dict[str, Any]:
    """Results as words."""
    study, models = results.study, results.study.models
    counted = [one for one in results.judgements if one.task.kind == "real" and one.annotator not in results.without]
    people = len({one.annotator for one in counted})
    items = len({one.task.item for one in counted})
    basis = f"{_count(len(counted), 'judgement')} of {_count(items, 'item')} by {_count(people, 'annotator')}"
    basis += f" ({METHODS[study.method]})"
    if results.median_seconds is not None:
        basis += f", {results.median_seconds:.1f} seconds each in the median"
    if results.without:
        basis += "; without annotator " + ", ".join(str(one + 1) for one in results.without)
    means: dict[int, dict[str, str]] = defaultdict(dict)
    for one in results.means:
        means[one.model][one.criterion] = f"{one.value:.2f}" + _interval(one.low, one.high, "{:.2f}")
    return {
        "headline": _headline(results),
        "basis": basis + ".",
        "method": study.method,
        "pairs": [_pair_view(models, pair) for pair in results.pairs],
        "strengths": [
            {
                "model": models[one.model],
                "value": _signed(one.value),
                "interval": _interval(one.low, one.high, "{:+.2f}"),
                "strongest": f"{100 * one.strongest:.0f} %",
            }
            for one in results.strengths
        ],
        "criteria": [one.name for one in study.criteria],
        "means": [{"model": models[model], "cells": cells} for model, cells in means.items()],
        "agreement": [
            {
                "of": one.of,
                "alpha": _alpha(one.alpha) or "–",
                "level": one.level,
                "units": one.units,
                "text": f"{one.of} {_alpha(one.alpha) or 'not known'} ({one.level}; {one.units} judged by several)",
            }
            for one in results.agreement
        ],
        "contested": [
            {"agreement": f"{100 * one.agreement:.0f} %", "annotators": one.annotators} | _item_view(one.item, models)
            for one in results.contested[:MOST_SHOWN]
            if one.agreement < 1
        ],
        "shared_items": len(results.contested),
        "deciding": [
            {"influence": _signed(one.influence), "wins": f"{one.wins:g}", "losses": f"{one.losses:g}"}
            | _item_view(one.item, models)
            for one in results.deciding[:MOST_SHOWN]
            if abs(one.influence) >= 0.005
        ],
        "first": models[results.strengths[0].model] if results.strengths else "",
        "second": models[results.strengths[1].model] if len(results.strengths) > 1 else "",
        "flips": results.flips,
        "examples": len(results.deciding),
        "workers": [_worker_view(one) for one in results.workers],
        "comments": [
            {"annotator": one.annotator + 1, "comment": one.answer.comment} | _item_view(one.item, models)
            for one in counted
            if one.answer.comment
        ],
        "errors": _errors(counted, models),
    }


def _headline(results: Results) -> str:
    if not results.strengths:
        return "Nothing is compared yet." if len(results.study.models) > 1 else "One model, rated by people."
    if results.preferred is None:
        return "No preference shown: what there is may be chance."
    return f"People prefer {results.study.models[results.preferred]}."


def _pair_view(models: Sequence[str], pair: Pair) -> dict[str, Any]:
    decided = pair.wins + pair.losses
    rate = interval = "–"
    text = f"{models[pair.first]} and {models[pair.second]}: no preference was given"
    if pair.rate is not None and pair.low is not None and pair.high is not None:
        rate, interval = f"{100 * pair.rate:.1f} %", f"[{100 * pair.low:.1f}, {100 * pair.high:.1f}]"
        text = f"{models[pair.first]} over {models[pair.second]}: {rate} {interval} of {decided} preferences"
    text += f"; {_count(pair.ties, 'tie')}, {pair.both_bad} times both bad"
    if pair.same_text:
        text += f"; the same text for {_count(pair.same_text, 'example')}, which nobody was asked about"
    return {
        "first": models[pair.first],
        "second": models[pair.second],
        "rate": rate,
        "interval": interval,
        "text": text,
    } | {key: getattr(pair, key) for key in ("wins", "losses", "ties", "both_bad", "same_text")}


def _worker_view(one: Worker) -> dict[str, Any]:
    known, again = f"{one.known_right} of {one.known}", f"{one.repeated_same} of {one.repeated}"
    seconds = "–" if one.median_seconds is None else f"{one.median_seconds:.1f} s"
    side = "–" if one.first is None else f"{100 * one.first:.0f} %"
    return {
        "number": one.number + 1,
        "done": one.done,
        "total": one.total,
        "known": known,
        "repeated": again,
        "seconds": seconds,
        "side": side,
        "last_at": one.last_at or "–",
        "text": f"{one.done} of {one.total} done; known answers {known} right; {again} repeated items the same; "
        f"{seconds} each; {side} of preferences for the first text",
    }


def _item_view(item: Item, models: Sequence[str]) -> dict[str, Any]:
    return {
        "origin": item.origin,
        "prompt": prompt_text(item.prompt),
        "texts": [(", ".join(models[model] for model in one.models), one.text) for one in item.candidates],
    }


def _errors(judgements: Iterable[Judgement], models: Sequence[str]) -> list[dict[str, Any]]:
    """The errors that were marked in each model's texts."""
    found: dict[int, list[str]] = defaultdict(list)
    for one in judgements:
        for mark in _marked(one):
            for model in mark["models"]:
                found[model].append(mark["text"])
    return [
        {"model": models[model], "count": len(texts), "texts": texts[:MOST_SHOWN]}
        for model, texts in sorted(found.items())
    ]


def _marked(one: Judgement) -> list[dict[str, Any]]:
    marks = []
    for span in one.answer.spans:
        candidate = one.item.candidates[one.task.order[span.place]]
        marks.append(asdict(span) | {"text": candidate.text[span.start : span.end], "models": list(candidate.models)})
    return marks


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def judgement_rows(results: Results) -> list[dict[str, Any]]:
    """Each answer that stands, with what was shown, in the order of places, and which models wrote it."""
    names = results.study.models
    rows = []
    for one in results.judgements:
        candidates = [one.item.candidates[which] for which in one.task.order]
        marked = [mark | {"models": [names[model] for model in mark["models"]]} for mark in _marked(one)]
        rows.append(
            {
                "annotator": one.annotator + 1,
                "position": one.position,
                "kind": one.task.kind,
                "example": one.item.example,
                "origin": one.item.origin,
                "prompt": one.item.prompt,
                "texts": [candidate.text for candidate in candidates],
                "models": [[names[model] for model in candidate.models] for candidate in candidates],
                "choice": one.answer.choice,
                "ranking": list(one.answer.ranking) if one.answer.ranking else None,
                "marks": one.answer.marks,
                "comment": one.answer.comment,
                "errors": marked,
                "seconds": one.answer.seconds,
                "at": one.at,
            }
        )
    return rows


def export_judgements(results: Results, file: Path) -> int:
    """Writes all answers that stand, to `.jsonl` or `.csv`, and their number. Raises `RecipeError` for another kind of
    file."""
    rows = judgement_rows(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    match file.suffix.lower():
        case ".jsonl":
            write_jsonl(file, rows)
        case ".csv":
            write_text(file, _csv(rows))
        case _:
            raise RecipeError(f"{file}: judgements are written as .jsonl or .csv.")
    return len(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an answer, a column for each place and each criterion; what is a list or messages is JSON."""
    flat = []
    for row in rows:
        line = {key: row[key] for key in ("annotator", "position", "kind", "example", "origin")}
        line["prompt"] = (
            row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        )
        for place, (text, models) in enumerate(zip(row["texts"], row["models"], strict=True), 1):
            line |= {f"text {place}": text, f"models {place}": ", ".join(models)}
        line["choice"] = row["choice"] or ""
        line["ranking"] = " > ".join(str(place + 1) for place in row["ranking"] or ())
        line |= row["marks"] or {}
        line["comment"] = row["comment"]
        line["errors"] = json.dumps(row["errors"], ensure_ascii=False) if row["errors"] else ""
        line |= {"seconds": "" if row["seconds"] is None else row["seconds"], "at": row["at"]}
        flat.append(line)
    columns = list(dict.fromkeys(column for line in flat for column in line))
    text = io.StringIO()
    text.write("\ufeff")  # without it a spreadsheet takes the file for another encoding
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def preference_rows(votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """Judged pairs as preference data: of two texts for a prompt the one that more people preferred is chosen. Where as
    many preferred the other, and where a text is empty, there is nothing to learn."""
    balance: dict[tuple[int, str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        low, high = sorted((vote.first.text, vote.second.text))
        balance[vote.example, low, high].append(vote)
    rows = []
    for (_, low, high), group in sorted(balance.items(), key=lambda one: one[0]):
        for_low = sum(vote.outcome if vote.first.text == low else -vote.outcome for vote in group)
        if for_low == 0 or not low.strip() or not high.strip():
            continue
        chosen, rejected = (low, high) if for_low > 0 else (high, low)
        preferred = sum(
            (vote.first if vote.outcome > 0 else vote.second).text == chosen for vote in group if vote.outcome
        )
        rows.append(
            {
                "prompt": group[0].item.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "preferred_by": preferred,
                "judged_by": len(group),
            }
        )
    return rows


def export_preferences(results: Results, file: Path) -> int:
    """Writes judged pairs as preference data, which `finespun train` reads, and their number. Raises `RecipeError` for
    another kind of file than `.jsonl`, `DataError` where there are none."""
    if file.suffix.lower() != ".jsonl":
        raise RecipeError(f"{file}: preference data is written as .jsonl.")
    rows = preference_rows(results.votes)
    if not rows:
        raise DataError("No text was preferred to another yet; there is nothing to train on.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows)
    return len(rows)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]".replace("-", "−")


def _alpha(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
