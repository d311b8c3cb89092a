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
    allow_changes: bool = False,
    plan: bool = False,
    find_lr: bool = False,
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
    allow_changes
        With --resume: go on although recipe, data or base weights are not those that the run began with.
    plan
        Say what would be trained, with how much memory and in what time, and stop.
    find_lr
        Try out rising learning rates on some batches, draw the loss against them, suggest one, and stop.
    quiet
        Print nothing but errors.
    """
    given = recipe.model_dump(exclude_unset=True) if recipe else {}
    if resume and (file or plan or find_lr):
        raise RecipeError("--resume goes on with a run as it was begun: give it no recipe, --plan or --find-lr.")
    if allow_changes and not resume:
        raise RecipeError("--allow-changes is for a run that goes on: give it with --resume.")
    if file and file.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"{file}: a recipe is a .yaml file. Give texts with --data {file}")
    chosen = Recipe() if resume else Recipe.load(file, given) if file else Recipe.parse(given)

    from finespun import finetuning
    from finespun.training.progress import Reporter

    reporter = Reporter(quiet)
    if plan or find_lr:
        lines = finetuning.plan(chosen, reporter) if plan else finetuning.find_learning_rate(chosen, reporter)
        print("\n".join(lines))
        return
    if resume:
        finished = finetuning.resume(resume, reporter, given, allow_changes)
    else:
        finished = finetuning.finetune(chosen, reporter=reporter)
    for line in finetuning.closing_words(finished.folder):
        reporter.say(line)
