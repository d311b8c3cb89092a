"""`finespun judge`, `judge results`, `judge export` and `judge preferences`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from finespun.errors import FinespunError
from finespun.evaluation.judging.settings import JudgeServerSettings, StudySettings
from finespun.evaluation.settings import EvaluationData
from finespun.generation.settings import Sampling

app = App(name="judge", help="Let people compare what models wrote, blind.")

Without = Annotated[list[int] | None, Parameter(negative=(), consume_multiple=True)]


@app.default
def judge(
    outputs: list[str],
    /,
    *,
    data: Annotated[EvaluationData | None, Parameter(name="data")] = None,
    study: Path = Path("judgements.sqlite"),
    settings: Annotated[StudySettings | None, Parameter(name="*")] = None,
    server: Annotated[JudgeServerSettings | None, Parameter(name="*")] = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
) -> None:
    """Let people compare what models wrote: a local web page for each, blind, until Ctrl-C.

    For example: finespun judge runs/tuned/evaluations/test runs/base/evaluations/test --annotators 3

    The same command goes on with the same study, and so does the study's file alone: finespun judge judgements.sqlite

    Parameters
    ----------
    outputs
        Evaluation folders, or their outputs.jsonl, one for each model; or, with --data, runs and models that write
        first. NAME=… calls a model NAME.
    data
        Prompts for what has not written yet.
    study
        The file in which the study is kept: what is judged, by whom, and each answer.
    """
    _check_packages()
    from finespun.evaluation.judging.server import serve
    from finespun.evaluation.judging.store import open_study

    if data:
        from finespun.evaluation.systems import outputs_to_judge
        from finespun.training.progress import Reporter

        outputs = outputs_to_judge(outputs, data, sampling, study, Reporter())
    store = open_study(outputs, study, settings or StudySettings())
    print(f"Study: {store.file} ({len(store.study.models)} models, {len(store.study.annotators)} annotators)")
    try:
        serve(store, server or JudgeServerSettings(), lambda what, link: print(f"{what}: {link}", flush=True))
    finally:
        store.close()


@app.command
def results(study: Path, /, *, page: Path | None = None, without: Without = None) -> None:
    """Say what people's judgements come to, on the terminal and as an HTML page.

    For example: finespun judge results judgements.sqlite

    Parameters
    ----------
    study
        The study's file.
    page
        The page to write [default: the name of the study with .results.html].
    without
        Numbers of annotators whose answers do not count.
    """
    _check_packages()
    from finespun.evaluation.judging.report import result_lines, study_results, write_results
    from finespun.evaluation.judging.store import Store

    found = study_results(Store.open(study), without or ())
    page = page or study.with_suffix(".results.html")
    write_results(found, page)
    print(*result_lines(found), f"Page: {page}", sep="\n")


@app.command
def export(study: Path, /, *, to: Path) -> None:
    """Write all answers, with what was shown and which models wrote it.

    For example: finespun judge export judgements.sqlite --to judgements.csv

    Parameters
    ----------
    study
        The study's file.
    to
        The file to write, .jsonl or .csv.
    """
    _check_packages()
    from finespun.evaluation.judging.report import export_judgements, study_results
    from finespun.evaluation.judging.store import Store

    print(f"{export_judgements(study_results(Store.open(study)), to)} answers written: {to}")


@app.command
def preferences(study: Path, /, *, to: Path, without: Without = None) -> None:
    """Write judged pairs as preference data, which train reads.

    For example: finespun judge preferences judgements.sqlite --to preferences.jsonl

    Of two texts for a prompt, the one that more people preferred is chosen; where there is none, the pair is left out.

    Parameters
    ----------
    study
        The study's file.
    to
        The .jsonl file to write.
    without
        Numbers of annotators whose answers do not count.
    """
    _check_packages()
    from finespun.evaluation.judging.report import export_preferences, study_results
    from finespun.evaluation.judging.store import Store

    print(f"{export_preferences(study_results(Store.open(study), without or ()), to)} pairs written: {to}")


def _check_packages() -> None:
    if missing := [name for name in ("fastapi", "uvicorn", "choix", "krippendorff") if find_spec(name) is None]:
        raise FinespunError(f"Judging needs the package {missing[0]}: pip install 'finespun[judge]'")
