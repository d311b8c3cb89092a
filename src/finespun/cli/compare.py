"""`finespun compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from finespun.errors import DataError, RecipeError
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling


def compare(
    systems: list[str],
    /,
    *,
    data: Annotated[EvaluationData | None, Parameter(name="data")] = None,
    name: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    judge_url: str | None = None,
    judge_model: str | None = None,
    rubric: Path | None = None,
    judge_examples: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    judge_concurrency: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 4,
    judge_max_tokens: int = 1024,
    judge_timeout: float = 120.0,
    settings: Annotated[EvaluationSettings | None, Parameter(name="*")] = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
    quiet: bool = False,
) -> None:
    """Say which of several systems writes better, by how much, and how sure that is.

    For example: finespun compare runs/stories/evaluations/test/base runs/stories/evaluations/test

    All have to have been given the same prompts. Differences are later minus earlier systems, each with a 95 %
    interval (paired bootstrap) and a p-value (approximate randomization), corrected for all that are made (Holm).

    Parameters
    ----------
    systems
        Evaluation folders; or, with --data, runs and models to evaluate first. NAME=… gives one a name.
    data
        Test data for what is not evaluated yet.
    name
        Name of the folders in the runs' evaluations [default: that of the data].
    out
        The folder to write [default: comparisons/ with the names of the systems].
    seed
        Of the resampling, and of the choice of examples to judge.
    judge_url
        An OpenAI-compatible address whose model judges each two outputs; its key is read from the environment variable
        FINESPUN_JUDGE_API_KEY.
    judge_model
        The name of that model.
    rubric
        A text file that says what a better output is.
    judge_examples
        Judge so many examples only, drawn by chance.
    judge_concurrency
        So many questions are under way at once.
    judge_max_tokens
        Longest reply of the judging model; one that thinks first needs more.
    judge_timeout
        Seconds that a reply may take.
    quiet
        Print nothing but errors.
    """
    if (judge_url is None) != (judge_model is None):
        raise RecipeError("--judge-url and --judge-model go together: where the judging model is, and its name.")
    if rubric is not None and judge_url is None:
        raise RecipeError("--rubric is for a judging model: give --judge-url and --judge-model too.")
    settings = settings or EvaluationSettings()
    out = out or Path("comparisons") / "-".join(Path(given.rpartition("=")[2]).name or "model" for given in systems)

    from finespun.evaluation.comparison import check_comparable
    from finespun.evaluation.comparison import compare as compared
    from finespun.evaluation.llm_judge import RUBRIC, Judge, judge_outputs
    from finespun.evaluation.systems import comparison_json, comparison_metrics, read_systems, unlike_settings
    from finespun.files import write_text
    from finespun.reports.comparison import comparison_lines, write_comparison
    from finespun.training.progress import Reporter

    reporter = Reporter(quiet)
    found = read_systems(systems, data, settings, sampling, name, out, reporter)
    outputs = {name: system.outputs for name, system in found.items()}
    check_comparable(outputs)
    with reporter.counting("Comparing", "metrics") as count:
        comparison = compared(outputs, comparison_metrics(found, settings), seed, on_metric=count)
    out.mkdir(parents=True, exist_ok=True)
    judgement = None
    if judge_url and judge_model:
        wanted = _text(rubric) if rubric else RUBRIC
        judge = Judge(judge_url, judge_model, wanted, judge_max_tokens, judge_concurrency, judge_timeout)
        try:
            with reporter.counting("Judging", "questions") as count:
                judgement = judge_outputs(outputs, judge, out / "judgements.jsonl", judge_examples, seed, count)
        except KeyboardInterrupt:
            reporter.say("What was judged is kept: the same command goes on from there.")
            raise
    notes = unlike_settings(found)
    write_text(
        out / "comparison.json",
        json.dumps(comparison_json(found, comparison, judgement, notes), indent=2, ensure_ascii=False) + "\n",
    )
    write_comparison(out / "comparison.html", comparison, judgement, notes)
    if not quiet:
        print(*comparison_lines(comparison, judgement, notes), f"Page: {out / 'comparison.html'}", sep="\n")


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from None
    if not text.strip():
        raise DataError(f"{file}: is empty; it should say what a better output is.")
    return text
