"""Each tracker with its real package and a store on this machine: nothing here goes over a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from finespun.errors import RecipeError, TrainingInterrupted
from finespun.training import trackers
from finespun.training.trackers import Trackers, check_installed

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")

RECIPE = {
    "model": "smollm2-135m",
    "data": {"source": ["a.jsonl", "b.jsonl:0.5"], "template": {"text": "{{ text }}" * 1000}},
    "training": {"learning_rate": 0.002, "epochs": 3, "schedule": "linear"},
}

History = dict[str, list[tuple[int, float]]]
"""Of each metric, the steps and values that a tracker has, in the order in which it has them."""


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the trackers put things; some read it once, when they are imported."""
    place = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
        patch.setenv("TRACKIO_DIR", str(place / "trackio"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield place
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "verse").mkdir()
    return tmp_path / "verse"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return installed(request.param)


def installed(name: str) -> str:
    if not find_spec(name):
        pytest.skip(f"{name} is not installed (finespun[{name}])")
    return name


def metrics(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "loss": loss, "tokens": 100 * step, **more}


def train(sent: Trackers, steps: Iterable[int], loss: float, error: BaseException | None = None) -> None:
    """Steps with the losses `loss` + step; then, if there is one, the error that ends training."""
    for step in steps:
        sent.log(metrics(step, loss + step))
    if error:
        raise error


def known(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "trackers.json").read_text(encoding="utf-8"))


def tensorboard_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


@cache
def wandb_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What is written down for `wandb sync`, by kind, from the first file to the last. Read once, for it takes long."""
    records: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def mlflow_client() -> Any:
    import mlflow

    return mlflow.MlflowClient()


def mlflow_run(folder: Path) -> Any:
    return mlflow_client().get_run(known(folder)["mlflow"]["id"])


def trackio_logs(folder: Path) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs("finespun", known(folder)["trackio"]["name"])


def history(name: str, folder: Path) -> History:
    """All that the tracker has of the run."""
    if name == "tensorboard":
        events = tensorboard_events(folder)
        return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    if name == "mlflow":
        run = mlflow_run(folder)
        stored = {key: mlflow_client().get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        return {key: [(each.step, each.value) for each in values] for key, values in stored.items()}
    if name == "wandb":
        items = [record["item"] for record in wandb_records(folder)["history"]]
        rows = [{"step": item["_step"], **{key: item[key] for key in item if key[0] != "_"}} for item in items]
    else:
        rows = [{key: row[key] for key in row if key != "timestamp"} for row in trackio_logs(folder)]
    found: History = {}
    for row in rows:
        for key in row.keys() - {"step"}:
            found.setdefault(key, []).append((row["step"], row[key]))
    return found


def recipe_of(name: str, folder: Path) -> Mapping[str, Any]:
    """The recipe as the tracker has it."""
    if name == "tensorboard":
        text = tensorboard_events(folder).Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert all(line.startswith("    ") for line in text.splitlines())
        return yaml.safe_load(text)
    if name == "mlflow":
        return mlflow_run(folder).data.params
    if name == "wandb":
        last = wandb_records(folder)["config"][-1]["update"]
        return {key: last[key] for key in RECIPE}
    import trackio

    (config,) = [run.config for run in trackio.Api().runs("finespun") if run.name == known(folder)["trackio"]["name"]]
    return {key: value for key, value in config.items() if key[0] != "_"}


def test_the_numbers_of_each_step_arrive_and_the_recipe(
    name: str, folder: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with Trackers([name], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
        sent.log(metrics(2, 2.0, validation_loss=3.0, note="warm", **{"chrF++": 12.5}))
        sent.log(metrics(3, 1.0))
    assert {key: sorted(values) for key, values in history(name, folder).items()} == {
        "epoch": [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (3, pytest.approx(0.3))],
        "loss": [(1, 4.0), (2, 2.0), (3, 1.0)],
        "tokens": [(1, 100), (2, 200), (3, 300)],
        "validation_loss": [(2, 3.0)],
        "chrFplusplus" if name == "mlflow" else "chrF++": [(2, 12.5)],  # MLflow takes no +
    }
    if name == "mlflow":
        assert recipe_of(name, folder) == {
            "model": "smollm2-135m",
            "data.source": '["a.jsonl", "b.jsonl:0.5"]',
            "data.template.text": ("{{ text }}" * 1000)[:6000],
            "training.learning_rate": "0.002",
            "training.epochs": "3",
            "training.schedule": "linear",
        }
    else:
        assert recipe_of(name, folder) == RECIPE
    assert len(said) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "" or name == "mlflow"


def test_a_run_that_goes_on_is_the_same_there_and_has_each_step_once(
    name: str, folder: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingInterrupted), Trackers([name], folder, RECIPE, said.append) as sent:
        train(sent, range(1, 6), 10.0, TrainingInterrupted("Stopped after step 5."))
    before = known(folder)
    if name == "mlflow":
        assert mlflow_run(folder).info.status == "KILLED"
    changed = {**RECIPE, "training": {**RECIPE["training"], "epochs": 4, "weight_decay": 0.5}}
    with Trackers([name], folder, changed, said.append, done=3) as sent:
        train(sent, range(4, 8), 20.0)
    assert known(folder) == before
    again = 20.0 if name == "tensorboard" else 10.0
    loss = [(1, 11.0), (2, 12.0), (3, 13.0), (4, again + 4), (5, again + 5), (6, 26.0), (7, 27.0)]
    assert sorted(history(name, folder)["loss"]) == loss
    if name == "tensorboard":
        # each at the step from which it holds, where a next run from there replaces it
        assert [text.step for text in tensorboard_events(folder).Tensors("recipe/text_summary")] == [1, 4]
    if name == "wandb":
        assert [record.get("exit_code", 0) for record in wandb_records(folder)["exit"]] == [255, 0]
        assert [record["run_id"] for record in wandb_records(folder)["run"]] == 2 * [before["wandb"]["id"]]
    if name == "mlflow":
        # it keeps a parameter as it was first
        params = recipe_of(name, folder)
        assert (params["training.epochs"], params["training.weight_decay"]) == ("3", "0.5")
    else:
        assert recipe_of(name, folder)["training"] == changed["training"]
    assert len(said) == 2
    assert capfd.readouterr().out == ""


def test_a_tracker_that_comes_later_gets_the_steps_from_there(folder: Path, said: list[str]) -> None:
    installed("tensorboard"), installed("trackio")
    with Trackers(["tensorboard"], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
        sent.log(metrics(2, 3.0))
    with Trackers(["tensorboard", "trackio"], folder, RECIPE, said.append, done=1) as sent:
        sent.log(metrics(2, 2.0))
    assert history("trackio", folder)["loss"] == [(2, 2.0)]
    assert history("tensorboard", folder)["loss"] == [(1, 4.0), (2, 2.0)]


def test_folders_of_the_same_name_are_different_runs_of_trackio(tmp_path: Path, said: list[str]) -> None:
    installed("trackio")
    for place, loss in ((tmp_path / "a" / "verse", 1.0), (tmp_path / "b" / "verse", 2.0)):
        place.mkdir(parents=True)
        with Trackers(["trackio"], place, RECIPE, said.append) as sent:
            sent.log(metrics(1, loss))
    assert history("trackio", tmp_path / "a" / "verse")["loss"] == [(1, 1.0)]
    assert history("trackio", tmp_path / "b" / "verse")["loss"] == [(1, 2.0)]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_how_a_run_ends_is_known_to_mlflow(
    folder: Path, said: list[str], error: BaseException | None, status: str
) -> None:
    installed("mlflow")
    with suppress(ValueError, KeyboardInterrupt), Trackers(["mlflow"], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
        assert mlflow_run(folder).info.status == "RUNNING"
        if error:
            raise error
    run = mlflow_run(folder)
    assert (run.info.status, run.info.run_name) == (status, "verse")
    assert mlflow_client().get_experiment(run.info.experiment_id).name == "finespun"


def test_the_file_of_mlflow_is_found_from_another_working_folder(
    tmp_path: Path, folder: Path, stores: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("mlflow")
    with Trackers(["mlflow"], folder, RECIPE, said.append):
        assert known(folder)["mlflow"].keys() == {"id"}
    (folder / "trackers.json").unlink()
    shutil.copy(stores / "mlflow.db", tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with Trackers(["mlflow"], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
    monkeypatch.chdir(folder)
    with Trackers(["mlflow"], folder, RECIPE, said.append, done=1) as sent:
        sent.log(metrics(2, 3.0))
    monkeypatch.chdir(tmp_path)
    assert history("mlflow", folder)["loss"] == [(1, 4.0), (2, 3.0)]
    assert not (folder / "mlflow.db").exists()


def test_a_step_of_tensorboard_is_on_disk_at_once(folder: Path, said: list[str]) -> None:
    installed("tensorboard")
    with Trackers(["tensorboard"], folder, RECIPE, said.append) as sent:
        train(sent, (1, 2, 3), 1.0)
        assert history("tensorboard", folder)["loss"] == [(1, 2.0), (2, 3.0), (3, 4.0)]


def test_mlflow_that_fails_is_said_once_and_left_alone(folder: Path, said: list[str]) -> None:
    installed("mlflow"), installed("tensorboard")
    with Trackers(["mlflow", "tensorboard"], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
        mlflow_client().delete_run(known(folder)["mlflow"]["id"])
        del said[:]
        for step in (2, 3):
            sent.log(metrics(step, 3.0))
    (line,) = said
    assert line.startswith("mlflow gets no more metrics")
    assert "must be in the 'active' state" in line
    assert len(line.splitlines()) == 1
    assert history("tensorboard", folder)["loss"] == [(1, 4.0), (2, 3.0), (3, 3.0)]


def test_a_full_disk_under_tensorboard_does_not_end_training(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("tensorboard")
    resource = pytest.importorskip("resource", reason="only Unix can forbid that files grow")
    monkeypatch.setattr(threading, "excepthook", lambda failed: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Trackers(["tensorboard"], folder, RECIPE, said.append) as sent:
        sent.log(metrics(1, 4.0))
        del said[:]
        (file,) = (folder / "tensorboard").iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limits[1]))
        try:
            train(sent, range(2, 10), 3.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = said
    assert line.startswith("tensorboard gets no more metrics")
    assert "File too large" in line


class Stub:
    """A tracker that fails where it is told to."""

    has_through = 0
    where = "a stub"

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.known = {"id": "7"}
        self.got: list[Any] = []

    def __call__(self, folder: Path, settings: Any, known: dict[str, str], done: int) -> Stub:
        print("Welcome to the stub!")
        self.got.append(("open", known, done))
        if self.fails == "open":
            raise OSError("no such host\ntry another")
        return self

    def log(self, numbers: Any, step: int) -> None:
        self.got.append(step)
        if self.fails == "log":
            raise OSError("no such host\ntry another")

    def close(self, end: str) -> None:
        print("Thanks for the metrics!")
        self.got.append(end)
        if self.fails == "close":
            raise OSError("no such host\ntry another")


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stub]:
    stubs = {name: Stub() for name in NAMES}
    monkeypatch.setattr(trackers, "_RUNS", stubs)
    return stubs


def test_one_that_fails_is_left_alone_and_the_others_go_on(
    folder: Path, said: list[str], stubs: dict[str, Stub], capfd: pytest.CaptureFixture[str]
) -> None:
    stubs["wandb"].fails, stubs["mlflow"].fails = "log", "close"
    with pytest.raises(ZeroDivisionError), Trackers(NAMES, folder, RECIPE, said.append, done=4) as sent:
        train(sent, (5, 6), 1.0, ZeroDivisionError())
    opened = ("open", {}, 4)
    assert stubs["wandb"].got == [opened, 5]
    assert all(stubs[name].got == [opened, 5, 6, "failed"] for name in ("tensorboard", "mlflow", "trackio"))
    assert said[len(NAMES) :] == [
        "wandb gets no more metrics, metrics.jsonl still does: no such host",
        "mlflow may lack the last metrics, metrics.jsonl has them: no such host",
    ]
    assert capfd.readouterr().out == ""


def test_one_that_cannot_be_opened_is_a_fault_and_the_others_are_closed(
    folder: Path, said: list[str], stubs: dict[str, Stub]
) -> None:
    stubs["mlflow"].fails = "open"
    with pytest.raises(RecipeError, match=r"^training.trackers mlflow: no such host\ntry another$"):
        Trackers(NAMES, folder, RECIPE, said.append)
    assert stubs["wandb"].got == [("open", {}, 0), "failed"]
    assert stubs["trackio"].got == []
    # what was opened is known, so that the next try does not open another run there
    assert known(folder) == {"tensorboard": {"id": "7"}, "wandb": {"id": "7"}}
    with pytest.raises(RecipeError, match="no such host"):
        Trackers(["wandb", "mlflow"], folder, RECIPE, said.append)
    assert stubs["wandb"].got[2] == ("open", {"id": "7"}, 0)


def test_a_run_that_its_tracker_lost(folder: Path, said: list[str]) -> None:
    installed("mlflow")
    (folder / "trackers.json").write_text('{"mlflow": {"id": "00000000000000000000000000000000"}}')
    with pytest.raises(RecipeError, match=r"(?s)mlflow: .*not found.* take mlflow out of .*trackers.json"):
        Trackers(["mlflow"], folder, RECIPE, said.append)


def test_a_place_that_cannot_be_written(folder: Path, said: list[str]) -> None:
    installed("tensorboard")
    (folder / "tensorboard").touch()
    with pytest.raises(RecipeError, match=r"training.trackers tensorboard: .*File exists"):
        Trackers(["tensorboard"], folder, RECIPE, said.append)


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_package_is_named(
    missing: str, tmp_path: Path, folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [
        module for module in sys.modules if module.split(".")[0] == missing or "utils.tensorboard" in module
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RecipeError, match=rf"{missing}.*pip install 'finespun\[{missing}\]'"):
        Trackers([missing], folder, RECIPE, said.append)
    with pytest.raises(RecipeError, match=rf"{missing}.*pip install 'finespun\[{missing}\]'"):
        check_installed([missing])


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(RecipeError, match="No module named 'wandb'"):
        check_installed(["wandb"])


def test_nothing_is_printed_when_python_ends(tmp_path: Path) -> None:
    installed("trackio")
    code = (
        "import sys; from pathlib import Path; from finespun.training.trackers import Trackers\n"
        "with Trackers(['trackio'], Path(sys.argv[1]), {}, lambda line: None) as sent: sent.log({'step': 1, 'loss': 2.0})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
