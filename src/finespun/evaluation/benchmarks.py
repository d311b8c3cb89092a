"""Standard benchmarks, by lm-eval: its tasks, its prompts and its metrics, answered by `BenchmarkModel`.

They lie where evaluations do, in `evaluations/NAME/` of a run or where they are told to:

summary.json          model, settings, and each task's metrics with lm-eval's standard error and a 95 % interval
results.json          what lm-eval itself gives, for programs that read that
samples_TASK.jsonl    lm-eval's log of each question
report.html           the table for people
base/                 the same of the model that the run started from
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz import process
from transformers import PreTrainedTokenizerBase

from finespun.errors import DataError, RecipeError, RunError
from finespun.evaluation.comparison import interval
from finespun.evaluation.evaluate import (
    SUMMARY,
    MeasuredDifference,
    base_name,
    check_folder,
    described,
    evaluation_folder,
    load_base,
)
from finespun.evaluation.perplexity import finite
from finespun.evaluation.settings import BenchmarkSettings
from finespun.files import write_json, write_text
from finespun.models.catalog import weights_sha256
from finespun.models.load import LoadedModel, load_model, locate_model
from finespun.reports.benchmarks import write_benchmarks
from finespun.runs import RunFolder
from finespun.training.progress import Reporter

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from finespun.evaluation.metrics import Measured

Metric = tuple[str, str]
"""A metric of lm-eval and the filter through which it sees answers."""


@dataclass(frozen=True)
class _Aggregated:
    """A task's metric on one system: what it gives for each question, and how lm-eval makes one figure of these."""

    answers: Sequence[Any]
    aggregate: Callable[[Sequence[Any]], Any]
    is_mean: bool

    @property
    def per_example(self) -> NDArray[np.float64] | None:
        """A figure that is no mean is that of a collection: its interval comes from leaving questions out."""
        return np.asarray(self.answers, dtype=np.float64) if self.is_mean else None

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        if self.is_mean:
            answers = np.asarray(self.answers, dtype=np.float64)
            return float((answers if draw is None else answers[draw]).mean())
        return float(self.aggregate(self.answers if draw is None else [self.answers[place] for place in draw]))


@dataclass(frozen=True)
class _Asked:
    """What every model is asked: the tasks of these names."""

    manager: TaskManager
    names: list[str]
    settings: BenchmarkSettings
    limit: int | None
    reporter: Reporter


@dataclass(frozen=True)
class _System:
    """What lm-eval found of one model."""

    tokenizer: PreTrainedTokenizerBase
    results: dict[str, Any]
    measured: dict[tuple[str, Metric], _Aggregated]
    summary: dict[str, Any]


@contextmanager
def _quiet_lm_eval() -> Generator[None]:
    """Inside, lm-eval warns of nothing: what matters is said by finespun."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet_lm_eval()
def evaluate_benchmarks(
    run: str | Path,
    settings: BenchmarkSettings,
    *,
    limit: int | None = None,
    base: bool = False,
    name: str | None = None,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Has the model called `run`, with `base` also the one that it was trained from, take the benchmarks of `settings`,
    the first `limit` questions of each, and returns the folder in which all of it is: `out`, or `evaluations/name` of
    the run. Each answer is kept, so that what was interrupted goes on.

    Raises `RecipeError` without lm-eval and for a task that is not known or cannot be run here, `DataError` for one
    whose data cannot be had, `RunError`, `ModelNotFound` and `ModelError`.
    """
    _check_package()
    if not settings.tasks:
        raise RecipeError("tasks: name at least one benchmark, such as --tasks hellaswag.")
    reporter = reporter or Reporter()
    weights = weights_sha256(locate_model(str(run)).path)
    folder = RunFolder(Path(run))
    recipe = folder.recipe() if folder.recipe_file.is_file() else None
    target = evaluation_folder(folder if recipe else None, _name_of(settings.tasks), name, out)
    about = {
        "model": {"name": str(run), "weights": weights},
        "data": {"files": {}},
        "settings": {"benchmarks": _recorded(settings, limit)},
    }
    check_folder(target, about)
    base = base or (target / "base" / SUMMARY).is_file()
    below = base_name(str(run), recipe) if base else None
    reporter.say("Reading the tasks and their data")
    asked = _Asked(*_manager(settings), settings, limit, reporter)
    system = _evaluated(asked, about, lambda: load_model(str(run)))
    summary = system.summary
    if below:
        reporter.say(f"The same with {below}, which the run was trained from")
        about |= {"model": {"name": below, "weights": weights_sha256(locate_model(below).path)}}
        precision = summary["model"]["precision"]
        other = _evaluated(asked, about, lambda: load_base(below, precision, system.tokenizer, folder))
        _write(target / "base", other, other.summary)
        summary["base"] = {
            "model": other.summary["model"],
            "metrics": other.summary["metrics"],
            "differences": _differences(system, other),
        }
    _write(target, system, summary)
    return target


def _check_package() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise RecipeError("Benchmarks need the package lm_eval: pip install 'finespun[benchmarks]'") from None


def _name_of(tasks: Sequence[str]) -> str:
    names = (Path(task).stem if Path(task).suffix in (".yaml", ".yml") else task for task in tasks)
    return re.sub(r"[^\w+.-]+", "_", "+".join(names))[:80]


def _recorded(settings: BenchmarkSettings, limit: int | None) -> dict[str, Any]:
    given = settings.model_dump(mode="json", exclude_defaults=True)
    return given | ({} if limit is None else {"limit": limit}) | {"lm_eval": version("lm_eval")}


def _manager(settings: BenchmarkSettings) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, and the names that are asked for, patterns spelled out. Raises `RecipeError` for a name
    that no task has."""
    from lm_eval.tasks import TaskManager

    own = settings.tasks_folder
    if own and not own.is_dir():
        raise RecipeError(f"tasks_folder: {own} is no folder.")
    if own:  # to read lm-eval's own, more than ten thousand, takes seconds
        manager = TaskManager(include_path=str(own), include_defaults=False)
        if {*settings.tasks} <= {*manager.all_subtasks}:
            return manager, settings.tasks
    manager = TaskManager(include_path=str(own) if own else None)
    names: list[str] = []
    for task in settings.tasks:
        is_file = Path(task).suffix in (".yaml", ".yml") and Path(task).is_file()
        found = [task] if is_file else manager.match_tasks([task])
        if not found:
            like = ", ".join(name for name, _, _ in process.extract(task, manager.all_tasks, limit=3))
            places = f"lm-eval {version('lm_eval')}" + (f" and {own}" if own else "")
            raise RecipeError(f"tasks: {places} have no task {task!r}. Names like it are {like}.")
        names += found
    return manager, names


def _loaded_tasks(manager: TaskManager, names: Sequence[str]) -> TaskDict:
    """The tasks with their data. Raises `DataError` for one whose data cannot be had, and `RecipeError` for one that
    cannot be run here."""
    try:
        tasks = manager.load(list(names))
    except Exception as error:  # what readers of data, the hub, the network and tasks' own code raise
        raise _explained(manager, names, error) from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"{name}: runs code that the model writes, which finespun does not do.")
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"{name}: shows pictures or sounds, and the model reads texts.")
    return tasks


def _explained(manager: TaskManager, names: Sequence[str], error: Exception) -> DataError | RecipeError:
    """Which of the tasks cannot be loaded, and why."""
    culprit = names[0]
    for culprit in names:
        try:
            manager.load([culprit])
        except Exception as own:
            error = own
            break
    if isinstance(error, ImportError):
        return RecipeError(f"{culprit}: needs a package that is not installed ({error}).")
    if isinstance(error, OSError) or type(error).__module__.startswith(("datasets.", "huggingface_hub.", "httpx")):
        return DataError(
            f"{culprit}: its data are not on this machine and cannot be fetched: {error}. With a connection they are "
            "fetched once and kept; a copy of the task in --tasks-folder can name local files."
        )
    return RecipeError(f"{culprit}: cannot be loaded by lm-eval: {type(error).__name__}: {error}")


def _evaluated(asked: _Asked, about: Mapping[str, Any], load: Callable[[], LoadedModel]) -> _System:
    """What lm-eval finds of a model, which is loaded when all is known that the tasks need."""
    from lm_eval.evaluator import evaluate

    from finespun.evaluation.benchmark_model import BenchmarkModel

    as_chat = asked.settings.apply_chat_template
    with _seeded():
        tasks = _loaded_tasks(asked.manager, asked.names)
        notes = [note for name, task in tasks["tasks"].items() for note in _set_shots(name, task, asked.settings)]
        loaded = load()
        if as_chat and not loaded.tokenizer.chat_template:
            raise RecipeError(f"apply_chat_template: {about['model']['name']} has no chat template.")
        model = BenchmarkModel(loaded, about["model"]["weights"], asked.reporter)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            results: Any = evaluate(
                lm=model,
                task_dict=tasks,
                limit=asked.limit,
                apply_chat_template=as_chat,
                fewshot_as_multiturn=as_chat,
            )
    if asked.limit is not None:
        notes.append(
            f"Only the first {asked.limit:,} questions of each task were asked: not to be compared with figures for "
            "whole tasks."
        )
    measured = _measured(results, tasks)
    summary = {
        **about,
        "model": about["model"] | described(loaded),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": notes,
        "metrics": _metrics(results, measured),
    }
    return _System(loaded.tokenizer, results, measured, summary)


@contextmanager
def _seeded() -> Generator[None]:
    """The random state in which lm-eval reads its tasks and draws solved examples; afterwards it is as it was."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _set_shots(name: str, task: Task, settings: BenchmarkSettings) -> list[str]:
    """Gives a task its number of solved examples, as lm-eval's own command does; what is to be said of that."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own, wanted = task.get_config("num_fewshot"), settings.num_fewshot
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if own == 0 and wanted:
        return [f"{name} is made for no solved examples, so that it gets none."]
    if wanted is not None or own is None:
        task.set_config(key="num_fewshot", value=wanted or 0)
    return []


def _measured(results: Mapping[str, Any], tasks: TaskDict) -> dict[tuple[str, Metric], _Aggregated]:
    """What the figures of tasks, and of groups that are means over all their questions, are made of."""
    from lm_eval.api.metrics import mean

    found: dict[tuple[str, Metric], _Aggregated] = {}
    for name, task in tasks["tasks"].items():
        answers: dict[Metric, list[Any]] = {}
        for sample in results["samples"][name]:
            for metric in sample["metrics"]:
                answers.setdefault((metric, sample["filter"]), []).append(sample[metric])
        for metric, values in answers.items():
            aggregate = task.aggregation().get(metric[0], mean)
            found[name, metric] = _Aggregated(values, aggregate, aggregate is mean)
    for name, group in tasks.get("groups", {}).items():
        leaves = [task.task_name for task in group.get_all_tasks()]
        for key, value in results["results"].get(name, {}).items():
            metric = _metric_of(key)
            parts = [found[leaf, metric] for leaf in leaves if (leaf, metric) in found]
            if metric[0].endswith("_stderr") or not parts or not all(part.is_mean for part in parts):
                continue
            whole = _Aggregated([answer for part in parts for answer in part.answers], mean, True)
            if math.isclose(whole.value(), value, rel_tol=1e-9):
                found[name, metric] = whole
    return found


def _metric_of(key: str) -> Metric:
    """`acc,none` → acc, none."""
    metric, _, shown_through = key.partition(",")
    return metric, shown_through


def _metrics(results: Mapping[str, Any], measured: Mapping[tuple[str, Metric], _Aggregated]) -> list[dict[str, Any]]:
    """lm-eval's table, a line for each figure, the tasks of a group behind it."""
    lines = []
    for depth, name in _in_order(results):
        found = results["results"][name]
        for key, value in sorted(found.items()):
            metric = _metric_of(key)
            if "," not in key or metric[0].endswith("_stderr") or not isinstance(value, Real):
                continue
            error = found.get(f"{metric[0]}_stderr,{metric[1]}")
            higher = results["higher_is_better"].get(name, {}).get(metric[0])
            lines.append(
                {
                    "task": name,
                    "alias": found.get("alias", name).strip(" -"),
                    "depth": depth,
                    "version": results["versions"].get(name),
                    "questions": found.get("sample_len"),
                    "num_fewshot": results["n-shot"].get(name),
                    "name": metric[0],
                    "filter": metric[1],
                    "better": None if higher is None else "higher" if higher else "lower",
                    "value": finite(float(value)),
                    "stderr": None if error is None or isinstance(error, str) else finite(error),
                    **_bounds(measured.get((name, metric))),
                }
            )
    return lines


def _in_order(results: Mapping[str, Any]) -> list[tuple[int, str]]:
    """All tasks and groups that have results, each with the number of groups that it is in."""
    below: dict[str, list[str]] = results["group_subtasks"]
    inside = {name for children in below.values() for name in children}

    def walk(name: str, depth: int) -> Generator[tuple[int, str]]:
        if name in results["results"]:
            yield depth, name
            depth += 1
        for child in below.get(name, []):
            yield from walk(child, depth)

    return [each for name in {**below, **results["results"]} if name not in inside for each in walk(name, 0)]


def _bounds(measured: Measured | None, examples: int | None = None) -> dict[str, float | None]:
    """The 95 % interval of a figure, where its questions are known and leaving some out leaves a figure."""
    if isinstance(measured, _Aggregated):
        examples = len(measured.answers)
    if measured is None:
        return {"low": None, "high": None}
    try:
        found = interval(measured, examples=examples)
    except (ValueError, ZeroDivisionError):
        return {"low": None, "high": None}
    bounds = found.to_json()
    del bounds["value"]
    return bounds


def _differences(system: _System, base: _System) -> list[dict[str, Any]]:
    """What the run is ahead of its base in each figure, with the interval from the same questions for both."""
    of_base = {(line["task"], line["name"], line["filter"]): line["value"] for line in base.summary["metrics"]}
    found = []
    for line in system.summary["metrics"]:
        key = (line["task"], (line["name"], line["filter"]))
        value = of_base.get((line["task"], line["name"], line["filter"]))
        mine, other = system.measured.get(key), base.measured.get(key)
        both = mine is not None and other is not None and len(mine.answers) == len(other.answers)
        bounds = _bounds(MeasuredDifference(mine, other) if both else None, len(mine.answers) if mine else None)
        known = value is not None and line["value"] is not None
        found.append(
            {
                **{part: line[part] for part in ("task", "name", "filter")},
                "value": line["value"] - value if known else None,
                **bounds,
            }
        )
    return found


def _write(target: Path, system: _System, summary: Mapping[str, Any]) -> None:
    """Fills the folder; the summary makes it an evaluation."""
    from lm_eval.utils import handle_non_serializable

    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be created ({error.strerror}).") from None
    for task, samples in system.results["samples"].items():
        lines = (json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) for sample in samples)
        write_text(target / f"samples_{_name_of([task])}.jsonl", "".join(line + "\n" for line in lines))
    results = {key: value for key, value in system.results.items() if key != "samples"}
    text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
    write_text(target / "results.json", text + "\n")
    write_json(target / SUMMARY, summary)
    write_benchmarks(target)
