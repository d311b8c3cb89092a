"""`finespun compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from finespun.evaluation.settings import EvaluationData, EvaluationSettings, LLMJudgeSettings
from finespun.generation.settings import Sampling


def compare(
    systems: list[str],
    /,
    *,
    data: Annotated[EvaluationData | None, Parameter(name="data")] = None,
    name: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    judge: Annotated[LLMJudgeSettings | None, Parameter(name="*")] = None,
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
    quiet
        Print nothing but errors.
    """
    from finespun.evaluation.systems import Evaluations, compare_systems
    from finespun.reports.comparison import comparison_lines
    from finespun.training.progress import Reporter

    out = out or Path("comparisons") / "-".join(Path(given.rpartition("=")[2]).name or "model" for given in systems)
    evaluations = Evaluations(data, settings or EvaluationSettings(), sampling, name, out, Reporter(quiet))
    compared = compare_systems(systems, evaluations, judge or LLMJudgeSettings(), seed)
    if not quiet:
        print(*comparison_lines(compared), f"Page: {out / 'comparison.html'}", sep="\n")
