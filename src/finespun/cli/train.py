"""`finespun train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from finespun.errors import RecipeError
from finespun.recipe import Recipe


def train(
    file: Path | None = None,
    /,
    *,
    recipe: Annotated[Recipe | None, Parameter(name="*", consume_multiple=True)] = None,
    resume: Path | None = None,
    quiet: bool = False,
) -> None:
    """Fine-tune a model on texts.

    For example: finespun train --model smollm2-135m --data stories.txt --out runs/stories

    Parameters
    ----------
    file
        A recipe (YAML); options override what it says.
    resume
        A run folder: go on with its run after an interruption.
    quiet
        Print nothing but errors.
    """
    given = recipe.model_dump(exclude_unset=True) if recipe else {}
    if resume and (file or given):
        raise RecipeError("--resume goes on with a run as it was begun and takes no recipe or other options.")
    if file and file.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"{file}: a recipe is a .yaml file. Give texts with --data {file}")
    chosen = Recipe() if resume else Recipe.load(file, given) if file else Recipe.parse(given)

    from finespun import finetuning
    from finespun.training.progress import Reporter

    reporter = Reporter(quiet)
    finished = finetuning.resume(resume, reporter) if resume else finetuning.finetune(chosen, reporter=reporter)
    for line in finetuning.closing_words(finished.folder):
        reporter.say(line)
