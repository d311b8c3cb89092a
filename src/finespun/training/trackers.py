"""Metrics of a run, sent on to the experiment trackers that people use. What they get is what `metrics.jsonl` gets.

Each is a package of its own (`finespun[tensorboard]` and so on) and is set up by its own environment variables
(`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, …). A run that goes on after an interruption goes on there too: what it
takes to find it again is kept beside it, in `trackers.json`.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from uuid import uuid4

import yaml

from finespun.errors import RecipeError, TrainingInterrupted
from finespun.files import write_text
from finespun.recipe import Tracker

PROJECT = "finespun"
"""Name of the project, or experiment, under which a tracker files the runs."""

UPLOAD_SECONDS = 300
"""How long the end of a run waits for what is still to be uploaded; without a network that would have no end."""

Known = dict[str, str]
"""What it takes to find a run again in its tracker."""

End = Literal["finished", "interrupted", "failed"]


class _Run(Protocol):
    """A run, open in one tracker."""

    known: Known
    has_through: int
    """The last step that the tracker has already and cannot replace."""
    where: str
    """For a person: where the metrics are to be seen."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self, end: End) -> None: ...


class Trackers:
    """The trackers of one run. As a context they are closed at its end, however it ends.

    `settings` is the recipe, nested, and `done` the step after which the run goes on. Raises `RecipeError` for a
    tracker that cannot be opened. One that fails later is said once, through `say`, and then left alone.
    """

    def __init__(
        self,
        names: Sequence[Tracker],
        folder: Path,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
        done: int = 0,
    ) -> None:
        self._say = say
        self._open: dict[Tracker, _Run] = {}
        file = folder / "trackers.json"
        known: dict[str, Known] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        try:
            for name in dict.fromkeys(names):
                run = self._open[name] = _open(name, folder, settings, known.get(name, {}), done)
                known[name] = run.known
                write_text(file, json.dumps(known) + "\n")
                say(f"Metrics go to {run.where}")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Sends the numbers among the metrics of a step."""
        step = metrics["step"]
        numbers = {key: value for key, value in metrics.items() if key != "step" and isinstance(value, int | float)}
        for name, run in list(self._open.items()):
            if step <= run.has_through:
                continue
            try:
                run.log(numbers, step)
            except Exception as error:
                del self._open[name]
                self._say(f"{name} gets no more metrics, metrics.jsonl still does: {_first_line(error)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = isinstance(error, TrainingInterrupted | KeyboardInterrupt)
        end: End = "finished" if error is None else "interrupted" if stopped else "failed"
        while self._open:
            name, run = self._open.popitem()
            try:
                with redirect_stdout(sys.stderr):
                    run.close(end)
            except Exception as problem:
                self._say(f"{name} may lack the last metrics, metrics.jsonl has them: {_first_line(problem)}")


def check_installed(names: Sequence[Tracker]) -> None:
    """Raises `RecipeError` for the first tracker whose package is missing; opens nothing."""
    for name in names:
        spec = find_spec(name)
        # a mere folder of that name, which wandb makes in the working folder, is found too, without a file of its own
        if not spec or not spec.origin:
            raise _not_installed(name, f"No module named {name!r}")


def _open(name: Tracker, folder: Path, settings: Mapping[str, Any], known: Known, done: int) -> _Run:
    try:
        # stdout holds only what a command was asked for
        with redirect_stdout(sys.stderr):
            return _RUNS[name](folder, settings, known, done)
    except ImportError as error:
        raise _not_installed(name, str(error)) from None
    except Exception as error:
        anew = f" (To begin a new run there, take {name} out of {folder / 'trackers.json'}.)" if known else ""
        raise RecipeError(f"training.trackers {name}: {error or type(error).__name__}{anew}") from error


def _not_installed(name: Tracker, why: str) -> RecipeError:
    return RecipeError(f"training.trackers {name}: {why}. Install what it needs: pip install 'finespun[{name}]'")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _TensorBoard:
    """Event files in the run's folder. A step that is taken again hides the earlier one."""

    has_through = 0

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: Known, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        self.known = known
        self.where = f"TensorBoard: tensorboard --logdir {place}"
        self._writer = SummaryWriter(str(place), purge_step=done + 1)
        recipe = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        # TensorBoard reads Markdown, where four spaces keep text as it is
        self._writer.add_text("recipe", "".join(f"    {line}\n" for line in recipe.splitlines()), done + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        # TensorFlow writes the files where it is installed, and would keep two minutes of them in memory
        self._writer.flush()

    def close(self, end: End) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; its files lie in the run's folder unless `WANDB_DIR` names another."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: Known, done: int) -> None:
        import wandb

        # else it advertises its tracing of calls wherever a client of a language model has been imported
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=known.get("id"),
            resume="allow" if known else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", UPLOAD_SECONDS)),
                finish_timeout_raises=True,
            ),
        )
        # given to `init` as `config`, it would give way to what a resumed run already has
        self._run.config.update(dict(settings), allow_val_change=True)
        self.known = {"id": self._run.id}
        place = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else self._run.url or "disabled"
        self.where = f"Weights & Biases: {place}"
        self.has_through = self._run.step - 1
        if known and self._run.offline:
            here = Path(self._run.settings.sync_dir)
            parts = here.parent.glob(f"*run-*-{self._run.id}/run-{self._run.id}.wandb")
            self.has_through = max((_wandb_step(part) for part in parts if part.parent.name != here.name), default=0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step, commit=True)

    def close(self, end: End) -> None:
        # 255 is what wandb itself gives a run that Ctrl-C ends
        self._run.finish({"finished": 0, "failed": 1, "interrupted": 255}[end])


def _wandb_step(file: Path) -> int:
    """The last step in a file for `wandb sync`. Offline, wandb does not know what a run that it resumes has already."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    found = subprocess.run(command, capture_output=True, check=False)
    # a process that was killed may leave a file that cannot be read
    return json.loads(found.stdout)["step"] or 0 if found.returncode == 0 else 0


class _MLflow:
    """A run of MLflow in the store that `MLFLOW_TRACKING_URI` names, by default a file in the working folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: Known, done: int) -> None:
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        # MLflow's own file is found again from another working folder; a store that a person named may have a password
        # in its name and is not written down
        file = {} if mlflow.is_tracking_uri_set() else {"uri": known.get("uri") or mlflow.get_tracking_uri()}
        self._client = mlflow.MlflowClient(file.get("uri"))
        self._metric = Metric
        self.has_through = 0
        if known:
            run = self._client.get_run(known["id"])
            self._client.update_run(known["id"], status="RUNNING")
            history = self._client.get_metric_history(known["id"], "loss")
            self.has_through = max((metric.step for metric in history), default=0)
        else:
            run = self._client.create_run(self._experiment(), run_name=folder.name)
        self._id = run.info.run_id
        self.known = {"id": self._id, **file}
        store = re.sub("(?<=:)//[^/@]+@", "//", file.get("uri") or mlflow.get_tracking_uri())
        self.where = f"MLflow: run {run.info.run_name} in {store}"
        # MLflow takes a parameter once and for all
        new = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in _flat(settings) if key not in run.data.params]
        for start in range(0, len(new), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self._id, params=new[start : start + MAX_PARAMS_TAGS_PER_BATCH])

    def _experiment(self) -> str:
        """The id of the experiment, which is made where there is none."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        # MLflow takes no + in a name, and of other signs only these
        named = {re.sub(r"[^/\w.\- ]", "_", key.replace("+", "plus")): value for key, value in metrics.items()}
        self._client.log_batch(self._id, [self._metric(key, value, now, step) for key, value in named.items()])

    def close(self, end: End) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[end]
        self._client.set_terminated(self._id, status)


class _Trackio:
    """A run of Trackio, in the folder that `TRACKIO_DIR` names or in a Space. Trackio knows no failed runs, says its
    own failures as warnings, and has no setting against the banners that it prints."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: Known, done: int) -> None:
        import trackio

        # Trackio finds a run again by its name alone, and there may be another folder of that name
        name = known.get("name") or f"{folder.name}-{uuid4().hex[:6]}"
        with redirect_stdout(io.StringIO()):
            resume = "allow" if known else "never"
            self._run = trackio.init(PROJECT, name, config=dict(settings), resume=resume, embed=False)
        self._finish = trackio.finish
        self.known = {"name": name}
        self.where = f"Trackio: run {name} in trackio show --project {PROJECT}"
        # nothing public tells it, for a run in a Space as for one here
        self.has_through = getattr(self._run, "_next_step", 0) - 1

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, end: End) -> None:
        with redirect_stdout(io.StringIO()):
            self._finish()


_RUNS: dict[Tracker, Callable[[Path, Mapping[str, Any], Known, int], _Run]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
