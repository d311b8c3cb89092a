"""The report of a training run, made only of what is in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from finespun.reports.figures import count, date, duration, percent
from finespun.reports.page import bars, named, turns, write_page
from finespun.runs import RunFolder

UPLOT = Path(__file__).parents[1] / "vendor" / "uplot"
UPLOT_FILES = {"script": "uPlot.iife.min.js", "style": "uPlot.min.css", "licence": "LICENSE"}

LENGTH_ACTIONS = {
    "cut": "cut at the limit",
    "cut-left": "cut at their beginning",
    "skip": "left out",
    "split": "split into several",
}


def write_report(folder: RunFolder) -> None:
    """Writes `report.html` of the finished run in `folder`, whole or not at all.

    Raises `RunError` where the manifest cannot be read or the disk does not take the page.
    """
    write_page(folder.report, "training.html.j2", _view(folder))


def _view(folder: RunFolder) -> dict[str, Any]:
    """What the template shows, by name."""
    manifest, metrics = folder.manifest(), folder.metrics()
    data, results = manifest["data"], manifest.get("results")
    evaluated = manifest.get("recipe", {}).get("evaluation", {}).get("metrics", [])
    return {
        "name": folder.path.absolute().name,
        "started": date(datetime.fromisoformat(manifest["started"])) if manifest.get("started") else None,
        "manifest": manifest,
        "files": named(data["files"]),
        "results": results,
        "change": _change(results["perplexity_ratio"]) if results else None,
        "first": metrics[0] if metrics else None,
        "last": metrics[-1] if metrics else None,
        "tokens_trained": sum(line["tokens"] for line in metrics),
        "duration": duration(
            sum(line["tokens"] / line["tokens_per_second"] for line in metrics if line["tokens_per_second"])
        ),
        "points": _validation_points(metrics, results),
        "evaluated": evaluated,
        "evaluations": [line for line in metrics if evaluated and evaluated[0] in line],
        "charts": _charts(metrics, results, evaluated),
        "samples": [_sample(sample) for sample in folder.samples()],
        "length_limit": _length_limit(data),
        "bars": bars(**data["length_histogram"], median=data["length_median"], unit=" tokens"),
        "recipe": folder.recipe_file.read_text(encoding="utf-8"),
        "vendor": {name: (UPLOT / file).read_text(encoding="utf-8") for name, file in UPLOT_FILES.items()},
    }


def _change(ratio: Mapping[str, float]) -> dict[str, str]:
    """What a perplexity ratio and its interval say: a headline, and the change in percent."""
    value, low, high = (100 * (ratio[key] - 1) for key in ("value", "low", "high"))
    shown = {"value": _signed(value), "low": _signed(low), "high": _signed(high), "size": percent(abs(value))}
    if math.isinf(high):
        word = "lower" if value < 0 else "higher"
        return shown | {
            "kind": "unclear",
            "headline": f"Perplexity is {percent(abs(value))} {word} on the only held-out text",
        }
    if low <= 0 <= high:
        return shown | {"kind": "unclear", "headline": "No clear change in perplexity on unseen texts"}
    verb = "fell" if value < 0 else "rose"
    return shown | {"kind": verb, "headline": f"Perplexity on unseen texts {verb} by"}


def _signed(value: float) -> str:
    """Percent with its sign, a real minus."""
    return ("+" if value > 0 else "−" if value < 0 else "") + percent(abs(value))


def _charts(
    metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any] | None, evaluated: Sequence[str]
) -> dict[str, Any]:
    """The columns that the page draws; the untrained model's validation loss, where known, is step 0."""
    rows = [_step_zero(results), *metrics] if results else metrics
    keys = ("step", "epoch", "loss", "validation_loss", "learning_rate", "tokens_per_second")
    columns = {key: [_plottable(row.get(key)) for row in rows] for key in keys}
    return {
        "columns": columns,
        "evaluations": [[_plottable(row.get(name)) for row in rows] for name in evaluated],
        "names": evaluated,
        "best_step": results["best_step"] if results else None,
    }


def _validation_points(metrics: Iterable[Mapping[str, Any]], results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the table that stands in for the chart: step, epoch, loss, and whether the kept model is from there."""
    rows = [line for line in metrics if line.get("validation_loss") is not None]
    if results:
        rows = [_step_zero(results), *rows]
    best = results["best_step"] if results else None
    return [
        {
            "step": row["step"],
            "epoch": row["epoch"],
            "loss": row["validation_loss"],
            "perplexity": math.exp(row["validation_loss"]) if row["validation_loss"] < 700 else math.inf,
            "kept": row["step"] == best,
        }
        for row in rows
    ]


def _length_limit(data: Mapping[str, Any]) -> str:
    """What the length limit did to the training examples, in a sentence."""
    limit = f"{count(data['max_length'])} tokens"
    if not data["too_long"]:
        return f"Every training example fits within the limit of {limit}: nothing was cut, left out or split."
    were = "s longer than {} were" if data["too_long"] != 1 else " longer than {} was"
    done = f"{count(data['too_long'])} training example{were.format(limit)} {LENGTH_ACTIONS[data['too_long_action']]}."
    lost = data["tokens_lost"]
    if not lost:
        return f"{done} No token was lost."
    share = percent(100 * lost / (lost + data["train_tokens"]))
    return f"{done} {count(lost)} tokens, {share} of the training texts, were not trained."


def _step_zero(results: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": 0, "epoch": 0, "validation_loss": math.log(results["perplexity_before"]["value"])}


def _plottable(value: float | None) -> float | None:
    """JSON has no infinity, and six digits are more than a chart can show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        {
            "kind": when,
            "title": f"{when.capitalize()} training",
            "text": sample[when],
            "ended": sample[f"{when}_finish_reason"],
        }
        for when in ("before", "after")
    ]
    if sample["reference"] is not None:
        columns.append({"kind": "reference", "title": "Reference", "text": sample["reference"], "ended": None})
    return {
        "turns": turns(sample["prompt"]),
        "columns": [column | {"text": column["text"].strip("\n")} for column in columns],
    }
