"""`finespun evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from finespun.errors import RecipeError
from finespun.evaluation.settings import BenchmarkSettings, EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling


def evaluate(
    run: str,
    /,
    *,
    data: Annotated[EvaluationData | None, Parameter(name="data")] = None,
    base: bool = False,
    name: str | None = None,
    out: Path | None = None,
    settings: Annotated[EvaluationSettings | None, Parameter(name="*")] = None,
    benchmarks: Annotated[BenchmarkSettings | None, Parameter(name="*")] = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
    quiet: bool = False,
) -> None:
    """Write to test prompts and measure how good that is, or take standard benchmarks, with the doubt that remains.

    For example: finespun evaluate runs/stories --data test.jsonl --base

    Or: finespun evaluate runs/stories --tasks hellaswag arc_easy --base

    What was computed is kept: after an interruption the same command goes on.

    Parameters
    ----------
    run
        A run folder; or, with --out, any model.
    data
        Test data, read as the run's own data was: the same columns, the same templates.
    base
        Evaluate the model that the run was trained from too, and show the differences.
    name
        Name of the folder in the run's evaluations [default: that of the data or the tasks].
    out
        Another folder for what is found.
    quiet
        Print nothing but errors.
    """
    from finespun.training.progress import Reporter

    reporter = Reporter(quiet)
    try:
        if benchmarks:
            _check_given(data, settings, sampling)
            from finespun.evaluation.benchmarks import evaluate_benchmarks
            from finespun.reports.benchmarks import benchmark_lines

            limit = settings.limit if settings else None
            folder = evaluate_benchmarks(run, benchmarks, limit=limit, base=base, name=name, out=out, reporter=reporter)
            lines = benchmark_lines(folder)
        else:
            from finespun.evaluation.evaluate import evaluate as evaluated
            from finespun.reports.evaluation import evaluation_lines

            folder = evaluated(
                run, data or EvaluationData(), settings, sampling, base=base, name=name, out=out, reporter=reporter
            )
            lines = evaluation_lines(folder)
    except KeyboardInterrupt:
        reporter.say("What was computed is kept: the same command goes on from there.")
        raise
    if not quiet:
        print("\n".join(lines))


def _check_given(data: EvaluationData | None, settings: EvaluationSettings | None, sampling: Sampling | None) -> None:
    """Raises `RecipeError` for what benchmarks leave no choice about."""
    sections = [("data.", data), ("", settings), ("", sampling)]
    given = [prefix + key for prefix, section in sections if section for key in section.model_fields_set - {"limit"}]
    if given:
        option = sorted(given)[0].removesuffix(".source").replace("_", "-")
        raise RecipeError(
            f"--{option}: is for test data of your own; with --tasks, the tasks say what is asked and how."
        )
