"""The metrics of `finespun evaluate` while a model is being trained: of what it writes, greedily, for a sample of the
held-out prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finespun.data.formats import prompt_of
from finespun.data.templates import Encoder
from finespun.data.texts import HELD_OUT, Texts
from finespun.errors import DataError, RecipeError, TrainingInterrupted
from finespun.evaluation.evaluate import COPIED
from finespun.evaluation.examples import EvaluationExample, Trained, outputs_of
from finespun.evaluation.metrics import Metric, Novelty, metrics_for
from finespun.generation.engine import Completion, generate
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from finespun.recipe import VALIDATION_LOSS, EvaluationRecipe


@dataclass(frozen=True)
class SampleEvaluation:
    """A sample of held-out prompts, with all the answers to each, and what is measured, by its name in the recipe."""

    examples: list[EvaluationExample]
    prompts: list[list[int]]
    metrics: dict[str, Metric]
    sampling: Sampling

    def scores(
        self, loaded: LoadedModel, encoder: Encoder, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """What the metrics give for what the model writes now. Raises `TrainingInterrupted` soon after `stopped` says
        so, and `DataError` from a metric that fails."""

        def look(prompt: int, sample: int, text: str) -> None:
            if stopped():
                raise TrainingInterrupted("Stopped while the model was evaluated.")

        with torch.no_grad():  # a soft prompt is read outside of the passes
            written = generate(loaded, encoder, self.prompts, self.sampling, on_text=look)
        return self._measured([one for (one,) in written])

    def check(self) -> None:
        """Measures the references themselves, so that what a metric lacks is said before the training. Raises
        `RecipeError` or `DataError`."""
        self._measured([Completion(next(iter(each.references), ""), "stop", 1, 1) for each in self.examples])

    def _measured(self, written: Sequence[Completion]) -> dict[str, float]:
        outputs = outputs_of(self.examples, written)
        return {name: float(metric.measure(outputs).value()) for name, metric in self.metrics.items()}


def sample_evaluation(
    recipe: EvaluationRecipe, texts: Texts, encoder: Encoder, context: int, seed: int
) -> SampleEvaluation | None:
    """What `recipe` asks for, if it asks for any; its metrics are settled. Raises `RecipeError` where there are no
    held-out prompts, or the best checkpoint cannot go by what it should, and `DataError` for metrics that need
    references where there are none."""
    if recipe.every is None:
        return None
    examples, prompts = _sample(recipe, texts, encoder, context, seed)
    if not examples:
        raise RecipeError(
            "evaluation.every: measures on held-out texts, and there are none that leave room for an answer. Hold some "
            "out with data.validation, or leave `evaluation` out."
        )
    metrics = _metrics(recipe, texts)
    recipe.metrics = list(metrics)
    if recipe.best_by != VALIDATION_LOSS and metrics[recipe.best_by].better is None:
        raise RecipeError(
            f"evaluation.best_by {recipe.best_by}: neither more of it is better nor less; choose another."
        )
    found = SampleEvaluation(examples, prompts, metrics, Sampling(max_new_tokens=recipe.max_output_tokens))
    found.check()
    return found


def _sample(
    recipe: EvaluationRecipe, texts: Texts, encoder: Encoder, context: int, seed: int
) -> tuple[list[EvaluationExample], list[list[int]]]:
    """The prompts that were drawn, in the order of the data, and their token ids; none that leaves no room for an
    answer, or that the model's template refuses."""
    found: dict[str, EvaluationExample] = {}
    for number, example in texts.examples(HELD_OUT):
        asked = prompt_of(example)
        key = json.dumps([asked.prompt, asked.tools], ensure_ascii=False)
        one = found.setdefault(key, EvaluationExample(asked.prompt, asked.tools, texts.judged.places[number]))
        one.references += [asked.reference] if asked.reference not in one.references else []
    examples = list(found.values())
    drawn: dict[int, list[int]] = {}
    for place in random.Random(seed).sample(range(len(examples)), len(examples)):
        if len(drawn) == recipe.examples:
            break
        try:
            ids = encoder.encode_prompt(examples[place].prompt, examples[place].tools)
        except DataError:  # its row may have been left out of training too
            continue
        if len(ids) < context:
            drawn[place] = ids
    return [examples[place] for place in sorted(drawn)], [drawn[place] for place in sorted(drawn)]


def _metrics(recipe: EvaluationRecipe, texts: Texts) -> dict[str, Metric]:
    """The metrics by their names in the recipe: those that it names, or those that fit the data."""
    # how a text happens to go on is no reference by which other ways could be judged
    answered = texts.judged.shape != "text"
    names = recipe.metrics
    if names is None:
        names = [metric.name for metric in metrics_for(recipe.language, None, answered)]
        names += [recipe.best_by] if recipe.best_by not in (VALIDATION_LOSS, *names) else []
    others = [name for name in names if name not in COPIED]
    found = dict(zip(others, metrics_for(recipe.language, others, True), strict=True))
    if needing := [name for name, metric in found.items() if metric.needs_references and not answered]:
        raise DataError(
            f"evaluation.metrics {', '.join(needing)}: compares with answers, and plain texts have none. Choose "
            "metrics that need none, such as distinct-2, rep-4 and ended, or train on prompts with completions."
        )
    if len(others) < len(names):
        found |= {metric.name: metric for metric in Novelty(Trained(texts=texts).answers()).metrics}
    return {name: found[name] for name in names}
