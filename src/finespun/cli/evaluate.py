"""`finespun evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from finespun.evaluation.settings import EvaluationData, EvaluationSettings
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
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
    quiet: bool = False,
) -> None:
    """Write to test prompts and measure how good that is, with the doubt that remains.

    For example: finespun evaluate runs/stories --data test.jsonl --base

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
        Name of the folder in the run's evaluations [default: that of the data].
    out
        Another folder for what is found.
    quiet
        Print nothing but errors.
    """
    from finespun.evaluation.evaluate import evaluate as evaluated
    from finespun.reports.evaluation import evaluation_lines
    from finespun.training.progress import Reporter

    reporter = Reporter(quiet)
    try:
        folder = evaluated(
            run, data or EvaluationData(), settings, sampling, base=base, name=name, out=out, reporter=reporter
        )
    except KeyboardInterrupt:
        reporter.say("What was computed is kept: the same command goes on from there.")
        raise
    if not quiet:
        print("\n".join(evaluation_lines(folder)))
