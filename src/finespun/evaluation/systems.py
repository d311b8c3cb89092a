"""What is compared: evaluations that are there, or models that are evaluated first; and what comes of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from finespun.errors import DataError, RecipeError
from finespun.evaluation.comparison import Comparison, Wins, check_comparable, compare
from finespun.evaluation.llm_judge import Judgement, find_judge, judge_outputs
from finespun.evaluation.metrics import METRICS, Measured, Metric, metrics_for
from finespun.evaluation.metrics.base import Better, Totals, checked
from finespun.evaluation.outputs import Output, read_lines, read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings, LLMJudgeSettings
from finespun.files import write_json
from finespun.generation.settings import Sampling
from finespun.reports.comparison import write_comparison
from finespun.training.progress import Reporter


@dataclass(frozen=True)
class System:
    """An evaluation folder as it was read. `likelihoods` are `[examples, 4]`, as `TextLikelihood` has them, or None
    where they were not measured."""

    folder: Path
    summary: Mapping[str, Any]
    outputs: Sequence[Output]
    likelihoods: np.ndarray | None

    @classmethod
    def read(cls, folder: Path) -> System:
        """Raises `DataError` where a file of the evaluation is missing or not as it was written."""
        summary = _summary(folder)
        outputs = read_outputs(folder / "outputs.jsonl")
        lines = read_lines(folder / "scores.jsonl") if (folder / "scores.jsonl").is_file() else []
        keys = ("nats", "tokens", "text_nats", "bytes")
        try:
            rows = [[float(line["likelihood"][key]) for key in keys] for line in lines if "likelihood" in line]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{folder / 'scores.jsonl'}: was changed by hand. Have it evaluated anew.") from None
        return cls(folder, summary, outputs, np.array(rows) if rows and len(rows) == len(outputs) else None)


@dataclass(frozen=True)
class Evaluations:
    """How what a person named is found evaluated: an evaluation folder is; a run or a model is evaluated on `data`
    first, a run under `name` among its evaluations, a model in `out`."""

    data: EvaluationData | None
    settings: EvaluationSettings
    sampling: Sampling | None
    name: str | None
    out: Path
    reporter: Reporter

    def find(self, given: str) -> tuple[str, str, Path]:
        """For PLACE or NAME=PLACE, the name (empty where there is none), the place, and the folder of its evaluation.
        Raises `DataError` where there is none and no data, and what evaluating raises."""
        own, place = split_name(given)
        path = Path(place)
        if (path / "summary.json").is_file():
            return own, place, path
        if self.data is None:
            there = sorted(each.parent for each in (path / "evaluations").glob("*/summary.json"))
            choice = f" It has the evaluations {', '.join(map(str, there))}." if there else ""
            raise DataError(
                f"{path}: is no evaluation.{choice} Name an evaluation, or give --data FILE to have it evaluated first."
            )
        from finespun.evaluation.evaluate import evaluate
        from finespun.runs import RunFolder

        self.reporter.say(f"Evaluating {path}")
        is_run = RunFolder(path).recipe_file.is_file()
        out = None if is_run else self.out / "evaluations" / (own or str(path).strip("/").replace("/", "-"))
        name = self.name if is_run else None
        what = (path, self.data, self.settings, self.sampling)
        return own, place, evaluate(*what, name=name, out=out, reporter=self.reporter)


@dataclass(frozen=True)
class Compared:
    """What came of a comparison."""

    comparison: Comparison
    judgement: Judgement | None
    """What a judging model said, if one was asked."""
    notes: list[str]
    """In what else than the model the systems' evaluations differ."""


def compare_systems(given: Sequence[str], evaluations: Evaluations, judging: LLMJudgeSettings, seed: int) -> Compared:
    """Compares the systems that a person named, asks a judging model if there is one, and writes `comparison.json` and
    `comparison.html` into `evaluations.out`. Raises as `read_systems`, `compare` and `judge_outputs` do."""
    judge, out, reporter = find_judge(judging), evaluations.out, evaluations.reporter
    systems = read_systems(given, evaluations)
    outputs = {name: system.outputs for name, system in systems.items()}
    check_comparable(outputs)
    with reporter.counting("Comparing", "metrics") as count:
        comparison = compare(outputs, comparison_metrics(systems, evaluations.settings), seed, on_metric=count)
    out.mkdir(parents=True, exist_ok=True)
    judgement = None
    if judge:
        try:
            with reporter.counting("Judging", "questions") as count:
                kept = out / "judgements.jsonl"
                judgement = judge_outputs(outputs, judge, kept, judging.judge_examples, seed, count)
        except KeyboardInterrupt:
            reporter.say("What was judged is kept: the same command goes on from there.")
            raise
    compared = Compared(comparison, judgement, unlike_settings(systems))
    write_json(out / "comparison.json", comparison_json(systems, compared))
    write_comparison(out / "comparison.html", compared)
    return compared


def read_systems(given: Sequence[str], evaluations: Evaluations) -> dict[str, System]:
    """The systems that a person named, by their names: NAME= before a place, else that of the model.

    Raises `RecipeError` where there are fewer than two, or two of one name, and what evaluating raises.
    """
    if len(given) < 2:
        raise RecipeError("A comparison takes two systems or more: evaluation folders, runs or models.")
    found = [(own, place, System.read(folder)) for own, place, folder in map(evaluations.find, given)]
    models = Counter(str(system.summary["model"]["name"]) for _, _, system in found)
    systems: dict[str, System] = {}
    for own, place, system in found:
        model = str(system.summary["model"]["name"])
        name = own or (model if models[model] == 1 else place)
        if name in systems:
            raise RecipeError(f"Two systems are called {name}: give each a name, as in base={given[0]}.")
        systems[name] = system
    return systems


def outputs_to_judge(
    given: Sequence[str], data: EvaluationData, sampling: Sampling | None, study: Path, reporter: Reporter
) -> list[str]:
    """NAME=FOLDER of what each of `given` has written to the prompts of `data`, for the study in the file `study`."""
    settings = EvaluationSettings(likelihood="off", metrics=["length"])
    evaluations = Evaluations(data, settings, sampling, study.stem, study.with_suffix(""), reporter)
    return [f"{own or place}={folder}" for own, place, folder in map(evaluations.find, given)]


def comparison_metrics(systems: Mapping[str, System], settings: EvaluationSettings) -> list[Metric]:
    """By what systems are compared: the metrics that were asked for, else those of their evaluations, and the
    likelihood where all have it. Raises as `metrics_for` does."""
    every = list(systems.values())
    names = settings.metrics or _asked_before(every)
    first = every[0].summary
    language = settings.language or first["settings"]["evaluation"].get("language")
    against_references = names is not None or any(
        metric["name"] in METRICS and METRICS[metric["name"]](None).needs_references for metric in first["metrics"]
    )
    metrics = metrics_for(language, names, against_references)
    for metric in metrics:
        checked(metric, every[0].outputs)
    return metrics if settings.metrics or settings.likelihood == "off" else [*_likelihood(every), *metrics]


def unlike_settings(systems: Mapping[str, System]) -> list[str]:
    """In what else than the model evaluations differ, each in a line."""
    flat = {
        name: {
            f"{part}.{key}": value
            for part, values in system.summary["settings"].items()
            for key, value in values.items()
            if key not in ("metrics", "limit")
        }
        for name, system in systems.items()
    }
    lines = []
    for key in sorted({key for values in flat.values() for key in values}):
        values = {name: each.get(key, "not set") for name, each in flat.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            lines.append(f"{key} differs: " + ", ".join(f"{value} for {name}" for name, value in values.items()))
    return lines


@dataclass(frozen=True)
class _Likelihood:
    """A likelihood, which was measured with the evaluations, as a metric of all their outputs one behind the other."""

    name: str
    signature: str
    measured: Totals
    better: Better = "lower"
    needs_references: bool = False

    def measure(self, outputs: Sequence[Output]) -> Measured:
        return self.measured


def _likelihood(systems: Sequence[System]) -> list[Metric]:
    """Bits per byte, and perplexity where all cut texts into as many tokens; none unless all measured the same."""
    known = [system.likelihoods for system in systems if system.likelihoods is not None]
    if len(known) < len(systems):
        return []
    found: list[Metric] = []
    for name, columns, scale in (
        ("perplexity", [0, 1], lambda nats: math.exp(min(nats, 700))),
        ("bits per byte", [2, 3], lambda nats: nats / math.log(2)),
    ):
        sums = [each[:, columns] for each in known]
        signatures = {_signature(system, name) for system in systems}
        same_units = all(np.array_equal(each[:, 1], sums[0][:, 1]) for each in sums)
        if len(signatures) == 1 and (same_units or name == "bits per byte"):
            score = partial(_for_each_unit, scale)
            rows = np.concatenate(sums)
            per_example = np.array([score(row) for row in rows.tolist()])
            found.append(_Likelihood(name, signatures.pop(), Totals(per_example, rows, score)))
    return found


def _for_each_unit(scale: Callable[[float], float], sums: Sequence[float]) -> float:
    return scale(sums[0] / sums[1]) if sums[1] else math.nan


def _signature(system: System, metric: str) -> str:
    return next((each["signature"] for each in system.summary["metrics"] if each["name"] == metric), "")


def _asked_before(systems: Sequence[System]) -> list[str] | None:
    """The metrics that the evaluations were asked for, if all were."""
    asked = [system.summary["settings"]["evaluation"].get("metrics") for system in systems]
    if not all(asked):
        return None
    from finespun.evaluation.evaluate import COPIED

    return [name for name in dict.fromkeys(chain.from_iterable(asked)) if name not in COPIED] or None


def split_name(given: str) -> tuple[str, str]:
    """The name and the place in NAME=PLACE; no name where `given` is a place, which may have an equals sign in it."""
    name, equals, place = given.partition("=")
    named = bool(equals and name and place) and not Path(given).exists() and "/" not in name
    return (name, place) if named else ("", given)


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    if (folder / "results.json").is_file():
        raise DataError(
            f"{folder}: holds benchmarks, whose answers are not compared here; `finespun evaluate RUN --tasks … "
            "--base` shows differences."
        )
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        _ = summary["model"]["name"], summary["settings"]["evaluation"], [each["name"] for each in summary["metrics"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: is not as `finespun evaluate` wrote it ({type(error).__name__}: {error}). Have it evaluated anew."
        ) from None
    return summary


def comparison_json(systems: Mapping[str, System], compared: Compared) -> dict[str, Any]:
    """All that a comparison found, as `comparison.json` holds it."""
    names, comparison, judgement = list(systems), compared.comparison, compared.judgement
    return {
        "systems": [
            {"name": name, "evaluation": str(system.folder), "model": system.summary["model"]}
            for name, system in systems.items()
        ],
        "examples": comparison.examples,
        "resamples": comparison.resamples,
        "trials": comparison.trials,
        "seed": comparison.seed,
        "correction": "Holm",
        "notes": compared.notes,
        "metrics": [
            {
                "name": scores.metric,
                "better": scores.better,
                "signature": scores.signature,
                "systems": [each.to_json() for each in scores.systems],
            }
            for scores in comparison.scores
        ],
        "differences": [
            {
                "metric": each.metric,
                "first": names[each.first],
                "second": names[each.second],
                **each.value.to_json(),
                "p_resampled": each.p_resampled,
                "p_randomization": each.p_randomization,
                "p_corrected": each.p_corrected,
                "shown": each.shown,
                "better": None if each.ahead is None else names[each.ahead],
                "wins": _wins_json(each.wins) if each.wins else None,
            }
            for each in comparison.differences
        ],
        "furthest": [
            {"first": names[first], "second": names[second], "second_ahead": found[0], "first_ahead": found[1]}
            for first, second in comparison.pairs
            if (found := comparison.furthest(first, second))
        ],
        "judge": _judgement_json(judgement, names) if judgement else None,
    }


def _judgement_json(judgement: Judgement, names: Sequence[str]) -> dict[str, Any]:
    return {
        **asdict(judgement.judge),
        "models": judgement.models,
        "questions": judgement.questions,
        "prompt_tokens": judgement.prompt_tokens,
        "completion_tokens": judgement.completion_tokens,
        "uncounted": judgement.uncounted,
        "failures": [{"origin": origin, "reason": reason} for origin, reason in judgement.failures],
        "pairs": [
            {
                "first": names[pair.first],
                "second": names[pair.second],
                "wins": _wins_json(pair.wins),
                "agreement": pair.agreement,
                "kappa": pair.kappa,
                "first_place": pair.first_place.to_json(),
                "outcomes": {str(example): outcome for example, outcome in pair.outcomes.items()},
            }
            for pair in judgement.pairs
        ],
    }


def _wins_json(wins: Wins) -> dict[str, Any]:
    return {**asdict(wins), "rate": wins.rate.to_json()}
