"""The benchmarks that a model took, as a page and on a terminal, made only of what is in their folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from finespun.reports.evaluation import beside, verdict
from finespun.reports.figures import aligned, count, date
from finespun.reports.page import write_page


def write_benchmarks(folder: Path) -> None:
    """Writes `report.html` of the benchmarks in `folder`. Raises `RunError` where the disk does not take it."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = _rows(summary)
    view = {
        "name": folder.absolute().name,
        "evaluated": date(datetime.fromisoformat(summary["evaluated"])),
        "summary": summary,
        "headline": _headline(summary, rows),
        "rows": rows,
    }
    write_page(folder / "report.html", "benchmarks.html.j2", view)


def benchmark_lines(folder: Path) -> list[str]:
    """What benchmarks found, for a terminal."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = _rows(summary)
    base = summary.get("base")
    head = ["", "n-shot", "metric", summary["model"]["name"], "stderr", "95 % interval"]
    table = [[*head, *([base["model"]["name"], "difference"] if base else [])]]
    for row in rows:
        cells = [row[key] for key in ("task", "num_fewshot", "metric", "value", "stderr", "interval")]
        more = [row["base"], f"{row['difference']} ({row['difference_interval']}) {row['verdict']}"] if base else []
        table.append([*cells, *more])
    return [*summary["notes"], *aligned(table), _headline(summary, rows), f"Report: {folder / 'report.html'}"]


def _rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures in words, with those of the base and the difference where it took them too."""
    base = summary.get("base") or {"metrics": [], "differences": []}
    of_base = {_key(metric): metric for metric in base["metrics"]}
    differences = {_key(difference): difference for difference in base["differences"]}
    rows = []
    for metric in summary["metrics"]:
        shown_through = "" if metric["filter"] == "none" else f" ({metric['filter']})"
        row = {
            "task": "  " * metric["depth"] + metric["alias"],
            "num_fewshot": "" if metric["num_fewshot"] is None else str(metric["num_fewshot"]),
            "metric": metric["name"] + shown_through,
            "better": metric["better"] or "",
            "value": _figure(metric["value"]),
            "stderr": _figure(metric["stderr"]),
            "interval": _between(metric),
            "questions": "" if metric["questions"] is None else count(metric["questions"]),
            "version": "" if metric["version"] is None else str(metric["version"]),
        }
        if difference := differences.get(_key(metric)):
            row |= {
                "base": _figure(of_base[_key(metric)]["value"]) if _key(metric) in of_base else "–",
                "difference": _figure(difference["value"], signed=True),
                "difference_interval": _between(difference, signed=True),
                "verdict": verdict(difference, metric["better"]),
            }
        rows.append(row)
    return rows


def _key(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["task"], line["name"], line["filter"]


def _figure(value: float | None, signed: bool = False) -> str:
    """The four decimals of lm-eval's own tables; "–" where there is no figure."""
    if value is None:
        return "–"
    return ("−" if value < 0 else "+" if signed else "") + f"{abs(value):.4f}"


def _between(interval: Mapping[str, float | None], signed: bool = False) -> str:
    low, high = interval["low"], interval["high"]
    return "none" if low is None or high is None else f"{_figure(low, signed)} to {_figure(high, signed)}"


def _headline(summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """What the benchmarks come to, in a sentence."""
    if "base" in summary:  # the tasks of a group are in its own figure
        verdicts = [row["verdict"] for row in rows if row["better"] and not row["task"].startswith(" ")]
        return beside(summary["base"]["model"]["name"], verdicts)
    tasks = {metric["task"]: metric["questions"] for metric in summary["metrics"] if metric["depth"] == 0}
    questions = sum(each or 0 for each in tasks.values())
    return f"{count(len(tasks))} benchmark{'' if len(tasks) == 1 else 's'}, {count(questions)} questions"
