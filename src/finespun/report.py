"""Figures become words: the report of a run, the page of a data check, that of an evaluation, each one HTML file that
needs nothing but a browser, and what a terminal shows of a check, a selection or an evaluation.

A report is made only of what is in its folder. Layouts are in the `.html.j2` files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.cells import cell_len

from finespun.data.check import Check
from finespun.data.selection import Selection
from finespun.evaluation.outputs import Output, read_lines, read_outputs
from finespun.files import write_text
from finespun.runs import RunFolder

if TYPE_CHECKING:
    from finespun.evaluation.comparison import Comparison, Difference
    from finespun.evaluation.llm_judge import Judged, Judgement
    from finespun.evaluation.perplexity import Interval

HERE = Path(__file__).parent

UPLOT = HERE / "vendor" / "uplot"
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
    _write_page(folder.report, "report.html.j2", _view(folder))


def write_check(check: Check, page: Path, name: str, model: str) -> None:
    """Writes the page of a check of the data called `name`, for the tokens of `model` where they were counted. Raises
    `RunError` where the disk does not take it."""
    lengths = check.lengths
    view = {
        "name": name,
        "model": model if lengths and lengths.unit == "tokens" else None,
        "checked": _date(datetime.now().astimezone().isoformat()),
        "check": check,
        "verdict": _verdict(check),
        "words": SEVERITIES,
        "bars": _bars({"counts": lengths.counts, "edges": lengths.edges}, lengths.median, lengths.unit)
        if lengths
        else None,
        "files": _named(check.files),
        "version": version("finespun"),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    _write_page(page, "check.html.j2", view)


def check_lines(check: Check, places: int = 3) -> list[str]:
    """What a check found, for a terminal; of each finding the first `places` rows."""
    lines = list(check.how)
    kept = f"{_count(check.train)} rows to train, {_count(check.held_out)} held out"
    lines.append(kept + "".join(f", {_count(number)} left out ({kind} …)" for kind, number in check.left_out.items()))
    if lengths := check.lengths:
        trained = _percent(100 * lengths.trained / max(lengths.total, 1))
        lines += [
            f"{_count(lengths.total)} {lengths.unit}, {trained} of them trained; an example has "
            f"{_count(lengths.median)} in the median, {_count(lengths.p95)} or fewer in 95 %, "
            f"{_count(lengths.longest)} at most",
            f"  0 {_sparkline(lengths.counts)} {_count(lengths.longest)}",
        ]
        if lengths.limits:
            lines.append("  with data.max_length   are longer          tokens beyond it")
            lines += [
                f"  {_count(limit.max_length):>15}   {_share(limit.longer, lengths.examples):<17}   "
                f"{_share(limit.beyond, lengths.total)}"
                for limit in lengths.limits
            ]
    if check.languages:
        total = sum(check.languages.values())
        said = [f"{code or 'not told'} {_percent(100 * number / total)}" for code, number in check.languages.items()]
        lines.append(f"Languages of what is trained: {', '.join(said[:8])}{', …' if said[8:] else ''}")
    lines += check.remarks
    for finding in check.findings:
        lines += ["", f"{SEVERITIES[finding.severity]}: {_share(finding.count, finding.of)} {finding.title}"]
        lines += [f"    {origin}{f': {detail}' if detail else ''}" for origin, detail in finding.places[:places]]
        if (rest := finding.count - places) > 0:
            lines.append(f"    … and {_count(rest)} more")
        lines.append(f"  → {finding.remedy}")
    return [*lines, "", _verdict(check)]


def selection_lines(selection: Selection, keep: int, left_out: int) -> list[str]:
    """What a selection changed, for a terminal; `left_out` rows of the pool were not looked at."""
    before, chance, after = (
        f"{value:.3f}"
        for value in (selection.divergence_before, selection.divergence_random, selection.divergence_after)
    )
    lines = [
        f"{_count(len(selection))} of {_count(len(selection.log_weights))} rows selected; "
        f"{_count(selection.near_duplicates)} passed over as near-duplicates",
        f"Distance from the target (KL divergence, nats): {before} for the whole pool, {chance} for as many "
        f"rows taken at random, {after} for the selection",
    ]
    if left_out:
        lines.append(f"{_count(left_out)} rows of the pool cannot be used or are left out by its cleaning")
    if len(selection) < keep:
        lines.insert(1, f"That is fewer than the {_count(keep)} asked for: nothing else is left that differs.")
    for what, moved in (("More frequent", selection.gained), ("Less frequent", selection.lost)):
        words = ", ".join(f"{unit} {100 * was:.2f} → {100 * now:.2f} %" for unit, was, now in moved[:8])
        lines.append(f"{what} than in the pool: {words or 'nothing'}")
    return lines


SEVERITIES = {"stops": "Stops training", "misleads": "Misleads", "look": "To look at"}


def _verdict(check: Check) -> str:
    """What a check comes to, in a sentence."""
    kinds = Counter(finding.severity for finding in check.findings)
    if kinds["stops"]:
        return "Training would refuse this data as it is."
    if kinds["misleads"]:
        return "Training would take this data, but would learn or measure something else than it seems to."
    return "Nothing was found that speaks against training." + (" Some things are worth a look." if kinds else "")


def _write_page(path: Path, template: str, view: Mapping[str, Any]) -> None:
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "percent": _percent,
        "share": _share,
        "perplexity": _perplexity,
        "interval": _interval,
        "sha256_source": _sha256_source,
    }
    write_text(path, environment.get_template(template).render(view))


def _view(folder: RunFolder) -> dict[str, Any]:
    """What the template shows, by name."""
    manifest, metrics = folder.manifest(), folder.metrics()
    data, results = manifest["data"], manifest.get("results")
    return {
        "name": folder.path.absolute().name,
        "started": _date(manifest.get("started")),
        "manifest": manifest,
        "files": _named(data["files"]),
        "results": results,
        "change": _change(results["perplexity_ratio"]) if results else None,
        "first": metrics[0] if metrics else None,
        "last": metrics[-1] if metrics else None,
        "tokens_trained": sum(line["tokens"] for line in metrics),
        "duration": _duration(
            sum(line["tokens"] / line["tokens_per_second"] for line in metrics if line["tokens_per_second"])
        ),
        "points": _validation_points(metrics, results),
        "charts": _charts(metrics, results),
        "samples": [_sample(sample) for sample in folder.samples()],
        "length_limit": _length_limit(data),
        "bars": _bars(data["length_histogram"], data["length_median"]),
        "recipe": folder.recipe_file.read_text(encoding="utf-8"),
        "vendor": {name: (UPLOT / file).read_text(encoding="utf-8") for name, file in UPLOT_FILES.items()},
    }


def _change(ratio: Mapping[str, float]) -> dict[str, str]:
    """What a perplexity ratio and its interval say: a headline, and the change in percent."""
    value, low, high = (100 * (ratio[key] - 1) for key in ("value", "low", "high"))
    shown = {"value": _signed(value), "low": _signed(low), "high": _signed(high), "size": _percent(abs(value))}
    if math.isinf(high):
        word = "lower" if value < 0 else "higher"
        return shown | {
            "kind": "unclear",
            "headline": f"Perplexity is {_percent(abs(value))} {word} on the only held-out text",
        }
    if low <= 0 <= high:
        return shown | {"kind": "unclear", "headline": "No clear change in perplexity on unseen texts"}
    verb = "fell" if value < 0 else "rose"
    return shown | {"kind": verb, "headline": f"Perplexity on unseen texts {verb} by"}


def _charts(metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any] | None) -> dict[str, Any]:
    """The columns that the page draws; the untrained model's validation loss, where known, is step 0."""
    rows = [_step_zero(results), *metrics] if results else metrics
    keys = ("step", "epoch", "loss", "validation_loss", "learning_rate", "tokens_per_second")
    columns = {key: [_plottable(row.get(key)) for row in rows] for key in keys}
    return {"columns": columns, "best_step": results["best_step"] if results else None}


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
    limit = f"{_count(data['max_length'])} tokens"
    if not data["too_long"]:
        return f"Every training example fits within the limit of {limit}: nothing was cut, left out or split."
    were = "s longer than {} were" if data["too_long"] != 1 else " longer than {} was"
    done = f"{_count(data['too_long'])} training example{were.format(limit)} {LENGTH_ACTIONS[data['too_long_action']]}."
    lost = data["tokens_lost"]
    if not lost:
        return f"{done} No token was lost."
    share = _percent(100 * lost / (lost + data["train_tokens"]))
    return f"{done} {_count(lost)} tokens, {share} of the training texts, were not trained."


def _count(number: float) -> str:
    """12345.6 → 12,346."""
    return f"{number:,.0f}"


def _share(number: int, of: int) -> str:
    """12 of 250 (4.8 %)."""
    return f"{_count(number)} of {_count(of)} ({_percent(100 * number / max(of, 1))})"


def _named(files: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(Path(path).name, path, digest) for path, digest in files.items()]


def _sparkline(counts: Sequence[int]) -> str:
    """A histogram in one line; what is not nothing can be seen."""
    highest = max(counts)
    return "".join("▁▂▃▄▅▆▇█"[math.ceil(7 * number / highest)] for number in counts)


def _percent(value: float) -> str:
    """Percent with as many digits as it takes to tell it from 0, and a fall from 100."""
    if math.isinf(value):
        return "∞ %"
    distance = min(abs(value), abs(100 - abs(value)) if abs(value) < 100 else math.inf)
    return f"{value:,.{0 if distance >= 9.95 or not distance else 1 if distance >= 0.095 else 2}f} %"


def _signed(value: float) -> str:
    """Percent with its sign, a real minus."""
    return ("+" if value > 0 else "−" if value < 0 else "") + _percent(abs(value))


def _perplexity(value: float) -> str:
    """Three digits or more: 3.14, 31.4, 3,142."""
    return "∞" if math.isinf(value) else f"{value:,.{2 if value < 9.995 else 1 if value < 999.5 else 0}f}"


def _interval(value: Mapping[str, float]) -> str:
    """The 95 % confidence interval of a perplexity."""
    return f"{_perplexity(value['low'])} to {_perplexity(value['high'])}"


def _duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def _sha256_source(script: str) -> str:
    """The name by which a Content-Security-Policy allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _step_zero(results: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": 0, "epoch": 0, "validation_loss": math.log(results["perplexity_before"]["value"])}


def _plottable(value: float | None) -> float | None:
    """JSON has no infinity, and six digits are more than a chart can show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    prompt = sample["prompt"]
    turns = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
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
    return {"turns": turns, "columns": [column | {"text": column["text"].strip("\n")} for column in columns]}


def _bars(histogram: Mapping[str, Sequence[float]], median: float, unit: str = "tokens") -> dict[str, Any]:
    """The histogram of lengths in units of its own picture: bars 1 wide, the highest 100 high."""
    counts, edges = histogram["counts"], histogram["edges"]
    highest = max(counts)
    bars = [
        {"height": 100 * number / highest, "title": f"{start:,.0f} to {end:,.0f} {unit}: {number:,}"}
        for number, start, end in zip(counts, edges, edges[1:], strict=False)
    ]
    ticks = [edges[0], (edges[0] + edges[-1]) / 2, edges[-1]]
    return {
        "bars": bars,
        "ticks": ticks,
        "highest": highest,
        "median": len(counts) * (median - edges[0]) / (edges[-1] - edges[0]),
    }


def _date(started: str | None) -> str | None:
    if not started:
        return None
    when = datetime.fromisoformat(started)
    return f"{when.day} {when:%B %Y, %H:%M}"


def write_evaluation(folder: Path) -> None:
    """Writes `report.html` of the evaluation in `folder`. Raises `DataError` where its files are not as they were
    written, `RunError` where the disk does not take the page."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    outputs = read_outputs(folder / "outputs.jsonl")
    scores = [line["scores"] for line in read_lines(folder / "scores.jsonl")]
    of_base = read_outputs(folder / "base" / "outputs.jsonl") if "base" in summary else None
    ranked_by = _ranked_by(summary["metrics"], scores)
    better = next((metric["better"] for metric in summary["metrics"] if metric["name"] == ranked_by), None)
    rows = _evaluation_rows(summary)
    view = {
        "name": folder.absolute().name,
        "evaluated": _date(summary["evaluated"]),
        "summary": summary,
        "headline": _evaluation_headline(summary, rows),
        "rows": rows,
        "main": [row for row in rows if row["name"] in (ranked_by, "perplexity", "bits per byte")],
        "histograms": _score_histograms(summary["metrics"], scores),
        "ranked_by": ranked_by,
        "groups": _best_and_worst(outputs, of_base, scores, ranked_by, better),
        "files": _named(summary["data"]["files"]),
        "version": version("finespun"),
    }
    _write_page(folder / "report.html", "evaluation.html.j2", view)


def evaluation_lines(folder: Path) -> list[str]:
    """What an evaluation found, for a terminal."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = _evaluation_rows(summary)
    base = summary.get("base")
    table = [["", summary["model"]["name"], "95 % interval", *([base["model"]["name"], "difference"] if base else [])]]
    for row in rows:
        more = [row["base"], f"{row['difference']} ({row['difference_interval']}) {row['verdict']}"] if base else []
        table.append([row["name"], row["value"], row["interval"], *more])
    widths = [max(cell_len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return [*summary["notes"], *lines, _evaluation_headline(summary, rows), f"Report: {folder / 'report.html'}"]


def _evaluation_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The metrics of an evaluation in words, with those of the base and the difference where it was evaluated too."""
    base = summary.get("base") or {"metrics": [], "differences": []}
    of_base = {metric["name"]: metric for metric in base["metrics"]}
    differences = {difference["name"]: difference for difference in base["differences"]}
    rows = []
    for metric in summary["metrics"]:
        row = {"name": metric["name"], "signature": metric["signature"], "better": metric["better"] or ""}
        row |= {"value": _figure(metric["value"]), "interval": _figures(metric)}
        if difference := differences.get(metric["name"]):
            row |= {
                "base": _figure(of_base[metric["name"]]["value"]),
                "difference": _figure(difference["value"], signed=True),
                "difference_interval": _figures(difference, signed=True),
                "verdict": _verdict_of(difference, metric["better"]),
            }
        rows.append(row)
    return rows


def _verdict_of(difference: Mapping[str, float | None], better: str | None) -> str:
    """Whether a difference between a run and its base is one, and a good one."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "no difference shown"
    if better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) == (better == "higher") else "worse"


def _evaluation_headline(summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """What an evaluation comes to, in a sentence."""
    examples = summary["data"]["examples"]
    if "base" not in summary:
        return f"Measured on {_count(examples)} example{'' if examples == 1 else 's'}"
    verdicts = Counter(row["verdict"] for row in rows if row["better"])
    name, total = summary["base"]["model"]["name"], verdicts.total()
    better, worse = verdicts["better"], verdicts["worse"]
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
    count: int = 5,
) -> list[dict[str, Any]]:
    """The examples that the page shows, in groups."""
    order = list(range(len(outputs)))
    groups = [("Examples", order[: 2 * count])]
    if ranked_by and len(order) > count:
        order.sort(key=lambda index: scores[index][ranked_by], reverse=better == "higher")
        best = order[: min(count, len(order) // 2)]
        worst = order[: -len(best) - 1 : -1]
        groups = [(f"Best by {ranked_by}", best), (f"Worst by {ranked_by}", worst)]
    shown = []
    for title, indices in groups:
        samples = []
        for index in indices:
            output = outputs[index]
            prompt = output.prompt
            samples.append(
                {
                    "origin": output.origin,
                    "turns": [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt,
                    "output": output,
                    "base": of_base[index] if of_base else None,
                    "scores": [
                        (name, _figure(scores[index][name]))
                        for name in scores[index]
                        if name in (ranked_by, "perplexity", "bits per byte")
                    ],
                }
            )
        shown.append({"title": title, "samples": samples})
    return shown


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
        bars = _bars({"counts": counts.tolist(), "edges": edges.tolist()}, median)
        for bar, number, start, end in zip(bars["bars"], counts, edges, edges[1:], strict=False):
            bar["title"] = f"{_figure(start)} to {_figure(end)}: {number:,}"
        ticks = [_figure(tick) for tick in bars["ticks"]]
        found.append({"name": metric["name"], "bars": bars | {"ticks": ticks}, "median": _figure(median)})
    return found


def _figure(value: float | None, signed: bool = False) -> str:
    """Four digits or more: 0.413, 41.30, 1,234.5; "–" where there is none."""
    if value is None:
        return "–"
    size = abs(value)
    digits = 1 if size >= 99.995 else 2 if size >= 9.9995 else 3 if size >= 0.00995 or not size else 4
    sign = "−" if value < 0 else "+" if signed else ""
    return f"{sign}{size:,.{digits}f}"


def _figures(interval: Mapping[str, float | None], signed: bool = False) -> str:
    """A 95 % interval; one example alone gives none."""
    if interval["low"] is None or interval["high"] is None:
        return "none"
    return f"{_figure(interval['low'], signed)} to {_figure(interval['high'], signed)}"


def write_comparison(page: Path, comparison: Comparison, judgement: Judgement | None, notes: Sequence[str]) -> None:
    """Writes the page of a comparison, with what a judging model said if one was asked. Raises `RunError` where the
    disk does not take it."""
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
        "compared": _date(datetime.now().astimezone().isoformat()),
        "headline": comparison_headline(comparison),
        "examples": comparison.examples,
        "comparison": comparison,
        "pairs": pairs,
        "judgement": judgement,
        "notes": notes,
        "version": version("finespun"),
    }
    _write_page(page, "comparison.html.j2", view)


def comparison_lines(comparison: Comparison, judgement: Judgement | None, notes: Sequence[str]) -> list[str]:
    """What a comparison found, for a terminal."""
    names = list(comparison.systems)
    lines = list(notes)
    for place, (first, second) in enumerate(comparison.pairs):
        table = [["", names[first], names[second], "difference", "95 % interval", "win/tie/loss", "p (Holm)", ""]]
        columns = ("name", "first", "second", "difference", "interval", "wins", "p", "verdict")
        table += [[row[column] for column in columns] for row in comparison_rows(comparison, first, second)]
        lines += [
            "",
            f"{names[second]} beside {names[first]}, {_count(comparison.examples)} examples",
            *_aligned(table),
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
                "first": _figure(scores.systems[first].value),
                "second": _figure(scores.systems[second].value),
                "intervals": [_bounds(scores.systems[place]) for place in (first, second)],
                "difference": _figure(value.value, signed=True),
                "interval": _bounds(value, signed=True),
                "bar": [50 + 48 * bound / reach for bound in (value.low, value.value, value.high)] if reach else None,
                "wins": f"{_count(wins.wins)}/{_count(wins.ties)}/{_count(wins.losses)}" if wins else "–",
                "rate": _rate(wins.rate) if wins else "–",
                "p": _p(difference.p_corrected),
                "p_randomization": _p(difference.p_randomization),
                "p_resampled": _p(difference.p_resampled),
                "verdict": _comparison_verdict(difference, names),
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
        between = f"between any two of the {len(names)} systems"
        shown = f"Of {_count(len(judged))} differences {between}, {_count(ahead.total())} are shown"
        return shown if ahead else f"No difference shown {between}"
    if not ahead:
        return f"No difference shown between {names[0]} and {names[1]}"
    if len(ahead) == 1:
        ((name, count),) = ahead.items()
        other = names[1 - names.index(name)]
        every = f"all {len(judged)}" if count == len(judged) > 1 else f"{count} of {len(judged)}"
        return f"{name} is better than {other} in {every} metric{'' if len(judged) == 1 else 's'}"
    return f"Of {len(judged)} metrics, " + " and ".join(f"{name} is better in {ahead[name]}" for name in names[::-1])


def _comparison_verdict(difference: Difference, names: Sequence[str]) -> str:
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
        return [f"The judge gave no verdict on any of {_count(len(judged.outcomes))} examples."]
    shown = (
        "no difference shown" if rate.low <= 0.5 <= rate.high else f"{second if rate.value > 0.5 else first} is better"
    )
    identical = f", {_count(counts['identical'])} of them identical outputs" if counts["identical"] else ""
    lines = [
        f"Judge: {second} wins {_rate(rate)} of {_count(decided)} examples, a tie as half a win "
        f"({_count(wins.wins)} won, {_count(wins.ties)} tied{identical}, {_count(wins.losses)} lost): {shown}."
    ]
    if counts["failed"]:
        lines.append(f"{_share(counts['failed'], len(judged.outcomes))} examples have no verdict and are not counted.")
    if judged.agreement is not None:
        kappa = "" if judged.kappa is None else f" (Cohen's kappa {_figure(judged.kappa)})"
        place = judged.first_place
        biased = place.low > 0.5 or place.high < 0.5
        side = f" It favours the {'first' if place.value > 0.5 else 'second'} place." if biased else ""
        of_decided = f"; of its decisions {_rate(place)} are for the response shown first" if place.value >= 0 else ""
        lines.append(
            f"Asked in both orders, the judge agrees with itself on {_percent(100 * judged.agreement)} of the "
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
        f"{_count(judgement.questions)} questions, {_count(judgement.prompt_tokens)} prompt tokens, "
        f"{_count(judgement.completion_tokens)} completion tokens"
        + (f" (not said for {_count(judgement.uncounted)} questions)" if judgement.uncounted else "")
    ]
    if judgement.failures:
        lines.append(f"{_count(len(judgement.failures))} questions failed; the same command asks them again:")
        lines += [f"    {origin}: {reason}" for origin, reason in judgement.failures[:5]]
    return lines


def _furthest(
    comparison: Comparison, first: int, second: int, judged: Judged | None, count: int = 5
) -> list[dict[str, Any]]:
    """The examples on which two systems differ most, in either direction; where no metric says, the first that do."""
    names = list(comparison.systems)
    outputs = [comparison.systems[names[place]] for place in (first, second)]
    furthest = comparison.furthest(first, second, count)
    if furthest is None:
        differing = [index for index, (a, b) in enumerate(zip(*outputs, strict=True)) if a.text != b.text]
        groups = [("Different outputs", differing[: 2 * count])]
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
                    "turns": [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt,
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
                for prompt in [outputs[0][index].prompt]
            ],
        }
        for title, indices in groups
        if indices
    ]


def _single_scores(comparison: Comparison, system: int, example: int) -> list[tuple[str, str]]:
    """Those of an example that are not the same for all systems."""
    return [
        (scores.metric, _figure(scores.per_example[system, example]))
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


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(cell_len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _bounds(interval: Interval, signed: bool = False) -> str:
    if math.isinf(interval.low) or math.isinf(interval.high):
        return "none"
    return f"{_figure(interval.low, signed)} to {_figure(interval.high, signed)}"


def _rate(rate: Interval) -> str:
    """A share with its interval, in percent."""
    low, high = (f"{100 * bound:.0f}" for bound in (rate.low, rate.high))
    return f"{100 * rate.value:.0f} % ({low} to {high} %)"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
