"""A model and test data → what it writes, how good that is, and how sure the figures are.

An evaluation lies in `evaluations/NAME/` of its run, or where it is told to:

outputs.jsonl    what the model wrote, one line an example, with prompt and references
scores.jsonl     the scores of each example
summary.json     model, data, settings, and each metric with its 95 % interval and signature
report.html      all of it for people
base/            the same of the model that the run started from
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finespun.data.sources import Items, raise_all
from finespun.data.templates import Encoder, TokenizedExample
from finespun.errors import DataError, RecipeError, RunError
from finespun.evaluation.comparison import interval
from finespun.evaluation.examples import (
    EvaluationExample,
    EvaluationTexts,
    Trained,
    read_examples,
    read_trained,
    without,
)
from finespun.evaluation.kept import Kept, write_all
from finespun.evaluation.likelihood import bits_per_byte_of, likelihoods, perplexity_of, sequences_to_score
from finespun.evaluation.metrics import Measured, Metric, metrics_for
from finespun.evaluation.outputs import Output, output_line
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.files import hash_of, write_text
from finespun.generation.engine import room_behind
from finespun.generation.settings import Sampling
from finespun.models.catalog import locate, weights_sha256
from finespun.models.load import LoadedModel, Precision, convert_packaged, grow_vocabulary, load_model
from finespun.recipe import Recipe
from finespun.report import write_evaluation
from finespun.runs import RunFolder
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter

SUMMARY = "summary.json"

NAMED = 5
"""Examples that a message names."""


@dataclass(frozen=True)
class Score:
    """A metric and what it measured on one system's outputs."""

    name: str
    better: Literal["higher", "lower"] | None
    signature: str
    measured: Measured


@dataclass(frozen=True)
class _Difference:
    """What a metric gives for one system beyond what it gives for another, on the same examples."""

    of: Measured
    beyond: Measured
    per_example: NDArray[np.float64] | None = None

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        return self.of.value(draw) - self.beyond.value(draw)


@dataclass(frozen=True)
class _Task:
    """What every system of an evaluation is asked."""

    examples: list[EvaluationExample]
    settings: EvaluationSettings
    sampling: Sampling
    metrics: Sequence[Metric]
    reporter: Reporter


def evaluate(
    run: str | Path,
    data: EvaluationData | Items,
    settings: EvaluationSettings | None = None,
    sampling: Sampling | None = None,
    *,
    base: bool = False,
    name: str | None = None,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Evaluates the model called `run` on `data`, with `base` also the one that it was trained from, and returns the
    folder in which all of it is: `out`, or `evaluations/name` of the run, `name` being that of the data by default.

    What was computed is kept: an evaluation that was interrupted goes on, one that is asked again is only scored again.
    Raises `DataError`, `RecipeError`, `RunError`, `ModelNotFound` and `ModelError`.
    """
    settings, sampling, reporter = settings or EvaluationSettings(), sampling or Sampling(), reporter or Reporter()
    if sampling.logprobs is not None:
        raise RecipeError("`logprobs` is not kept in an evaluation; leave it out.")
    weights = _weights(str(run))
    folder = RunFolder(Path(run))
    recipe = folder.recipe() if folder.recipe_file.is_file() else None
    target = _target(folder if recipe else None, data, name, out)
    texts = read_examples(data, recipe.data if recipe else None)
    trained = read_trained(recipe.data if recipe else None, folder.manifest()["data"]["files"] if recipe else {})
    examples, leakage = _examples(texts, trained, settings)
    task = _Task(examples, settings, sampling, _metrics(examples, texts.plain, settings), reporter)
    about = {
        "model": {"name": str(run), "weights": weights},
        "data": {"files": texts.files, "rows": texts.rows, "examples": len(examples)},
        "settings": _recorded(data, settings, sampling),
    }
    _check_folder(target, about)
    base = base or (target / "base" / SUMMARY).is_file()
    base_name = _base_name(str(run), recipe) if base else None
    reporter.say(f"{texts.rows:,} rows of test data, {len(examples):,} examples")
    for line in leakage["notes"]:
        reporter.say(line)

    loaded = load_model(str(run))
    about["model"] |= _described(loaded)
    outputs, scores = _measure(task, loaded, _encoder(loaded, recipe), weights)
    summary = _summary(about, outputs, scores, leakage)
    if base_name:
        dtype: Any = str(loaded.causal_lm.dtype).removeprefix("torch.")
        tokenizer = loaded.tokenizer
        del loaded  # two models may be too much for the memory
        below = _base(base_name, dtype, tokenizer)
        weights = _weights(base_name)
        of_base = {**about, "model": {"name": base_name, "weights": weights} | _described(below)}
        reporter.say(f"The same with {base_name}, which the run was trained from")
        base_outputs, base_scores = _measure(task, below, _encoder(below, recipe), weights)
        base_summary = _summary(of_base, base_outputs, base_scores, {"notes": []})
        _write(target / "base", base_outputs, base_scores, base_summary)
        summary["base"] = {
            "model": base_summary["model"],
            "metrics": base_summary["metrics"],
            "differences": _differences(scores, base_scores, len(examples)),
        }
    _write(target, outputs, scores, summary)
    return target


def _target(run: RunFolder | None, data: EvaluationData | Items, name: str | None, out: str | Path | None) -> Path:
    """The folder of the evaluation."""
    if out is not None:
        if name is not None:
            raise RecipeError("`name` and `out` both say where the evaluation goes; give one.")
        return Path(out)
    if run is None:
        raise RunError("This is a model and no run folder: say where the evaluation goes with --out DIR.")
    if name is None:
        source = data.source[0] if isinstance(data, EvaluationData) and data.source else "texts"
        name = Path(source).name.partition(".")[0] or "texts"
    if name != Path(name).name or name in (".", ".."):
        raise RecipeError(f"`name` {name!r} should be the name of a folder; --out takes a path.")
    return run.path / "evaluations" / name


def _examples(
    texts: EvaluationTexts, trained: Trained, settings: EvaluationSettings
) -> tuple[list[EvaluationExample], dict[str, Any]]:
    """The examples to evaluate, and what is to be said of those that were trained."""
    examples = texts.examples
    seen = [str(example.origin) for example in examples if trained.holds(example)]
    left_out = bool(seen) and settings.exclude_trained
    if left_out:
        examples = without(examples, trained)
    notes = []
    if trained.missing:
        notes.append(f"Whether test rows were trained is not known: {trained.missing}.")
    if seen:
        done = (
            "are left out"
            if left_out
            else "make the scores look better than they are (--exclude-trained leaves them out)"
        )
        named = ", ".join(seen[:NAMED]) + (", …" if len(seen) > NAMED else "")
        notes.append(f"{len(seen):,} of {len(texts.examples):,} examples were trained and {done}: {named}")
    if not examples:
        raise DataError("All examples of the test data were trained, so that nothing is left to evaluate.")
    return examples[: settings.limit], {
        "trained": seen,
        "left_out": left_out,
        "missing": trained.missing,
        "notes": notes,
    }


def _metrics(examples: Sequence[EvaluationExample], plain: bool, settings: EvaluationSettings) -> list[Metric]:
    """What is measured on the outputs. Raises `DataError` for a metric that needs references which are not there."""
    bare = [str(example.origin) for example in examples if not example.references]
    # how a text happens to go on is no reference by which other ways could be judged, unless somebody asks for that
    has_references = not bare and (settings.metrics is not None or not plain)
    metrics = metrics_for(settings.language, settings.metrics, has_references)
    needing = [metric.name for metric in metrics if metric.needs_references]
    if needing and bare:
        raise DataError(
            f"{', '.join(needing)}: needs references, which {len(bare):,} of {len(examples):,} examples have not: "
            f"{', '.join(bare[:NAMED])}{', …' if len(bare) > NAMED else ''}. Add them, or choose other --metrics."
        )
    return metrics


def _recorded(
    data: EvaluationData | Items, settings: EvaluationSettings, sampling: Sampling
) -> dict[str, Mapping[str, Any]]:
    read = data.model_dump(exclude={"source"}, exclude_none=True) if isinstance(data, EvaluationData) else {}
    return {
        "data": read,
        "evaluation": settings.model_dump(exclude_none=True),
        "generation": sampling.model_dump(exclude_defaults=True),
    }


def _check_folder(target: Path, about: Mapping[str, Any]) -> None:
    """Raises `RunError` where the folder holds something else than this evaluation."""
    file = target / SUMMARY
    if not file.is_file():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunError(f"{target}: is there already and holds no evaluation. Choose another --name or --out.")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        old, new = (_compared(each) for each in (before, about))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{file}: is not as it was written; it was changed by hand. Remove {target}, or choose another --name."
        ) from None
    different = [
        f"{key} {old.get(key, 'not set')} → {new.get(key, 'not set')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if different:
        raise RunError(
            f"{target}: already holds another evaluation: {'; '.join(different)}. Choose another --name, or remove it."
        )


def _compared(about: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two evaluations the same."""
    weights = str(about["model"]["weights"])
    hashes = sorted(str(digest)[:12] for digest in about["data"]["files"].values())
    settings = {f"{part}.{key}": value for part, values in about["settings"].items() for key, value in values.items()}
    return {"model's weights": weights[:12], "test data": ", ".join(hashes), **settings}


def _base_name(run: str, recipe: Recipe | None) -> str:
    if recipe is None:
        raise RunError(f"{run}: is no run folder, so that it is not known which model it was trained from.")
    return recipe.model


def _base(name: str, precision: Precision, tokenizer: Any) -> LoadedModel:
    """The model that a run was trained from, asked in the way the run is."""
    below = load_model(name, precision)
    below.tokenizer = tokenizer
    grow_vocabulary(below)
    return below


def _encoder(loaded: LoadedModel, recipe: Recipe | None) -> Encoder:
    return Encoder(loaded.tokenizer, train_on=recipe.data.train_on if recipe else "all")


def _described(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "base": loaded.base_name,
        "parameters": loaded.causal_lm.num_parameters(),
        "precision": str(loaded.causal_lm.dtype).removeprefix("torch."),
    }


def _measure(task: _Task, loaded: LoadedModel, encoder: Encoder, weights: str) -> tuple[list[Output], list[Score]]:
    """What a model writes for the examples, and its scores."""
    computed_by = _computed_by(loaded, encoder, weights)
    prompts, sequences = _encoded(task, encoder, loaded.context_length)
    kept = Kept("outputs", [computed_by, task.sampling.model_dump(exclude_defaults=True)])
    with task.reporter.counting("Writing", "texts") as count:
        written = write_all(loaded, encoder, prompts, task.sampling, kept, lambda done: count(done, len(prompts)))
    outputs = [
        Output(
            index,
            str(example.origin),
            example.prompt,
            tuple(example.references),
            one.text,
            one.finish_reason,
            one.completion_tokens,
        )
        for index, (example, one) in enumerate(zip(task.examples, written, strict=True))
    ]
    scores = _likelihood(task, loaded, encoder, sequences, computed_by)
    for metric in task.metrics:
        task.reporter.say(f"Measuring {metric.name}")
        scores.append(Score(metric.name, metric.better, metric.signature, metric.measure(outputs)))
    return outputs, scores


def _weights(name: str) -> str:
    """SHA-256 of the weights of the model called `name`, or of its adapter."""
    location = locate(name)
    if location.kind == "package":
        location = convert_packaged(location)
    return weights_sha256(location.path)


def _computed_by(loaded: LoadedModel, encoder: Encoder, weights: str) -> list[Any]:
    """All that what a model makes of token ids depends on, beside these and settings."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    adapter = [config.to_dict() for config in loaded.model.peft_config.values()] if loaded.has_adapter else []
    return [
        weights,
        weights_sha256(loaded.base_path),
        adapter,
        hash_of(backend.to_str() if backend is not None else tokenizer.get_vocab()),
        encoder.stop_ids,
        str(loaded.causal_lm.dtype),
        loaded.device.type,
        [version(package) for package in ("finespun", "torch", "transformers", "peft")],
    ]


def _encoded(task: _Task, encoder: Encoder, context: int) -> tuple[list[list[int]], list[list[TokenizedExample]]]:
    """Token ids of all prompts, and of what the likelihood is measured on. Raises `DataError` for those that the model
    cannot read."""
    faults: list[str] = []
    prompts, sequences = [], []
    scope = task.settings.likelihood
    for example in task.examples:
        try:
            prompts.append(encoder.encode_prompt(example.prompt, example.tools))
            room_behind(prompts[-1], task.sampling, context)
            texts = example.texts if scope != "off" else []
            sequences.append(
                [
                    each
                    for text in texts
                    for each in sequences_to_score(text, encoder, scope if scope != "off" else "all")
                ]
            )
        except DataError as error:
            faults.append(f"{example.origin}: {error}")
    raise_all(faults, "Mend or remove these rows of the test data.", len(faults))
    return prompts, sequences


def _likelihood(
    task: _Task,
    loaded: LoadedModel,
    encoder: Encoder,
    sequences: Sequence[Sequence[TokenizedExample]],
    computed_by: Sequence[Any],
) -> list[Score]:
    """Perplexity and bits per byte; none where nothing is to be predicted."""
    settings = task.settings
    total = sum(map(len, sequences))
    if not total:
        return []
    window = min(settings.window or loaded.context_length, loaded.context_length)
    stride = settings.stride or max(1, window // 2)
    if stride >= window:
        raise RecipeError(f"`stride` {stride} should be below the window of {window} tokens that the model can read.")
    kept = Kept("likelihood", computed_by)
    with task.reporter.counting("Measuring likelihood", "texts") as count:
        found = likelihoods(
            CausalLM(loaded.model), encoder, sequences, window, stride, kept, lambda done: count(done, total)
        )
    of = f"of:{settings.likelihood}|window:{window}|stride:{stride}|finespun:{version('finespun')}"
    return [
        Score("perplexity", "lower", f"{of}|tokens:own", perplexity_of(found)),
        Score("bits per byte", "lower", of, bits_per_byte_of(found)),
    ]


def _summary(
    about: Mapping[str, Any], outputs: Sequence[Output], scores: Sequence[Score], leakage: Mapping[str, Any]
) -> dict[str, Any]:
    """What summary.json holds."""
    metrics = []
    for score in scores:
        found = interval(score.measured, examples=len(outputs))
        metrics.append(
            {
                "name": score.name,
                "value": _finite(found.value),
                "low": _finite(found.low),
                "high": _finite(found.high),
                "signature": score.signature,
                "better": score.better,
            }
        )
    return {
        **about,
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "leakage": {key: value for key, value in leakage.items() if key != "notes"},
        "notes": [*leakage["notes"], *_notes(outputs)],
        "metrics": metrics,
    }


def _notes(outputs: Sequence[Output]) -> list[str]:
    """What is striking about the outputs themselves."""
    notes = []
    if empty := [output.origin for output in outputs if not output.text.strip()]:
        notes.append(f"{len(empty):,} of {len(outputs):,} outputs are empty: {', '.join(empty[:NAMED])}")
    cut = sum(output.finish_reason == "length" for output in outputs)
    if cut:
        notes.append(f"{cut:,} of {len(outputs):,} outputs did not end by themselves and were cut")
    return notes


def _differences(scores: Sequence[Score], base: Sequence[Score], examples: int) -> list[dict[str, Any]]:
    """What the run is ahead of its base in each metric, with the interval from the same draws of examples for both."""
    of_base = {score.name: score.measured for score in base}
    found = []
    for score in scores:
        ahead = interval(_Difference(score.measured, of_base[score.name]), examples=examples)
        found.append({"name": score.name, **{key: _finite(getattr(ahead, key)) for key in ("value", "low", "high")}})
    return found


def _write(target: Path, outputs: Sequence[Output], scores: Sequence[Score], summary: Mapping[str, Any]) -> None:
    """Fills the folder; the summary comes last and makes it an evaluation. Raises `DataError` where outputs that are
    there already are not these."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be created ({error.strerror}).") from None
    lines = [output_line(output) for output in outputs]
    if (target / SUMMARY).is_file():
        _check_unchanged(target / "outputs.jsonl", lines)
    write_text(target / "outputs.jsonl", "".join(line + "\n" for line in lines))
    columns = {score.name: score.measured.per_example for score in scores}
    rows = (
        {
            "index": output.index,
            "scores": {
                name: float(column[output.index])
                for name, column in columns.items()
                if column is not None and math.isfinite(column[output.index])
            },
        }
        for output in outputs
    )
    write_text(target / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(target / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_evaluation(target)


def _check_unchanged(file: Path, lines: Sequence[str]) -> None:
    there = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.is_file() else []
    for number in range(max(len(there), len(lines))):
        if there[number : number + 1] != list(lines[number : number + 1]):
            raise DataError(
                f"{file}, line {number + 1}: is not what the model wrote; the file was changed by hand. Keep it under "
                "another name if it is of use, and remove the folder to have it written anew."
            )


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
