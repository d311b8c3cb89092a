"""An evaluation as a page and on a terminal, made only of what is in its folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from finespun.evaluation.outputs import Output, read_lines, read_outputs
from finespun.reports.figures import aligned, between, count, date, figure
from finespun.reports.page import bars, named, turns, write_page


def write_evaluation(folder: Path) -> None:
    """Writes `report.html` of the evaluation in `folder`. Raises `DataError` where its files are not as they were
    written, `RunError` where the disk does not take the page."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    outputs = read_outputs(folder / "outputs.jsonl")
    scores = [line["scores"] for line in read_lines(folder / "scores.jsonl")]
    of_base = read_outputs(folder / "base" / "outputs.jsonl") if "base" in summary else None
    ranked_by = _ranked_by(summary["metrics"], scores)
    better = next((metric["better"] for metric in summary["metrics"] if metric["name"] == ranked_by), None)
    rows = _rows(summary)
    view = {
        "name": folder.absolute().name,
        "evaluated": date(datetime.fromisoformat(summary["evaluated"])),
        "summary": summary,
        "headline": _headline(summary, rows),
        "rows": rows,
        "main": [row for row in rows if row["name"] in (ranked_by, "perplexity", "bits per byte")],
        "histograms": _score_histograms(summary["metrics"], scores),
        "ranked_by": ranked_by,
        "groups": _best_and_worst(outputs, of_base, scores, ranked_by, better),
        "files": named(summary["data"]["files"]),
    }
    write_page(folder / "report.html", "evaluation.html.j2", view)


def evaluation_lines(folder: Path) -> list[str]:
    """What an evaluation found, for a terminal."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = _rows(summary)
    base = summary.get("base")
    table = [["", summary["model"]["name"], "95 % interval", *([base["model"]["name"], "difference"] if base else [])]]
    for row in rows:
        more = [row["base"], f"{row['difference']} ({row['difference_interval']}) {row['verdict']}"] if base else []
        table.append([row["name"], row["value"], row["interval"], *more])
    return [*summary["notes"], *aligned(table), _headline(summary, rows), f"Report: {folder / 'report.html'}"]


def _rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The metrics of an evaluation in words, with those of the base and the difference where it was evaluated too."""
    base = summary.get("base") or {"metrics": [], "differences": []}
    of_base = {metric["name"]: metric for metric in base["metrics"]}
    differences = {difference["name"]: difference for difference in base["differences"]}
    rows = []
    for metric in summary["metrics"]:
        row = {"name": metric["name"], "signature": metric["signature"], "better": metric["better"] or ""}
        row |= {"value": figure(metric["value"]), "interval": between(metric["low"], metric["high"])}
        if difference := differences.get(metric["name"]):
            row |= {
                "base": figure(of_base[metric["name"]]["value"]),
                "difference": figure(difference["value"], signed=True),
                "difference_interval": between(difference["low"], difference["high"], signed=True),
                "verdict": verdict(difference, metric["better"]),
            }
        rows.append(row)
    return rows


def verdict(difference: Mapping[str, float | None], better: str | None) -> str:
    """Whether a difference between a run and its base is one, and a good one."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "no difference shown"
    if better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) == (better == "higher") else "worse"


def _headline(summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """What an evaluation comes to, in a sentence."""
    examples = summary["data"]["examples"]
    if "base" not in summary:
        return f"Measured on {count(examples)} example{'' if examples == 1 else 's'}"
    return beside(summary["base"]["model"]["name"], [row["verdict"] for row in rows if row["better"]])


def beside(name: str, verdicts: Sequence[str]) -> str:
    """What the verdicts on several metrics come to beside the base called `name`, in a sentence."""
    found, total = Counter(verdicts), len(verdicts)
    better, worse = found["better"], found["worse"]
    if not better and not worse:
        return f"No difference from {name} shown in any of {total} metrics"
    if better and worse:
        return f"Better than {name} in {better} of {total} metrics, worse in {worse}"
    return f"{'Better' if better else 'Worse'} than {name} in {better or worse} of {total} metrics"


def _ranked_by(metrics: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, float]]) -> str | None:
    """The metric by which examples are the best or the worst: one that suits single texts, if it was measured."""
    known = [metric["name"] for metric in metrics if metric["better"] and all(metric["name"] in row for row in scores)]
    return next((name for name in ("chrF++", "ROUGE-L", "BLEU") if name in known), known[0] if known else None)


def _best_and_worst(
    outputs: Sequence[Output],
    of_base: Sequence[Output] | None,
    scores: Sequence[Mapping[str, float]],
    ranked_by: str | None,
    better: str | None,
    most: int = 5,
) -> list[dict[str, Any]]:
    """The examples that the page shows, in groups."""
    order = list(range(len(outputs)))
    groups = [("Examples", order[: 2 * most])]
    if ranked_by and len(order) > most:
        order.sort(key=lambda index: scores[index][ranked_by], reverse=better == "higher")
        best = order[: min(most, len(order) // 2)]
        worst = order[: -len(best) - 1 : -1]
        groups = [(f"Best by {ranked_by}", best), (f"Worst by {ranked_by}", worst)]
    return [
        {
            "title": title,
            "samples": [
                {
                    "origin": outputs[index].origin,
                    "turns": turns(outputs[index].prompt),
                    "output": outputs[index],
                    "base": of_base[index] if of_base else None,
                    "scores": [
                        (name, figure(score))
                        for name, score in scores[index].items()
                        if name in (ranked_by, "perplexity", "bits per byte")
                    ],
                }
                for index in indices
            ],
        }
        for title, indices in groups
    ]


def _score_histograms(
    metrics: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, float]], bins: int = 24
) -> list[dict[str, Any]]:
    """How the scores of single examples are spread, for each metric that gives them any that differ."""
    found = []
    for metric in metrics:
        values = [row[metric["name"]] for row in scores if metric["name"] in row]
        if len(set(values)) < 3:
            continue
        counts, edges = np.histogram(values, bins=bins)
        median = float(np.median(values))
        drawn = bars(counts.tolist(), edges.tolist(), median, written=figure)
        found.append({"name": metric["name"], "bars": drawn, "median": figure(median)})
    return found
