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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finespun.data.sources import Items, raise_all
from finespun.data.templates import Encoder, TokenizedExample
from finespun.errors import DataError, RecipeError, RunError
from finespun.evaluation.comparison import interval
from finespun.evaluation.examples import (
    EvaluationExample,
    EvaluationTexts,
    Trained,
    outputs_of,
    read_examples,
    read_trained,
)
from finespun.evaluation.kept import Kept, write_all
from finespun.evaluation.likelihood import (
    TextLikelihood,
    bits_per_byte_of,
    likelihoods,
    perplexity_of,
    sequences_to_score,
)
from finespun.evaluation.metrics import Measured, Metric, Novelty, metrics_for
from finespun.evaluation.metrics.base import tokens
from finespun.evaluation.metrics.diversity import ends_in_loop
from finespun.evaluation.outputs import Output, output_line
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.files import hash_of, write_json, write_jsonl, write_text
from finespun.generation.engine import room_behind
from finespun.generation.settings import Sampling
from finespun.models.catalog import weights_sha256
from finespun.models.load import LoadedModel, Precision, grow_vocabulary, load_model, locate_model
from finespun.recipe import PromptFormat, Recipe, TrainOn
from finespun.reports.evaluation import write_evaluation
from finespun.runs import RunFolder
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter

SUMMARY = "summary.json"

NAMED = 5
"""Examples that a message names."""

COPIED = ("copied-4", "longest-copy")
"""Metrics that look outputs up in what the run was trained on."""


@dataclass(frozen=True)
class Score:
    """A metric and what it measured on one system's outputs."""

    name: str
    better: Literal["higher", "lower"] | None
    signature: str
    measured: Measured


@dataclass(frozen=True)
class MeasuredDifference:
    """What a metric gives for one system beyond what it gives for another, on the same examples."""

    of: Measured
    beyond: Measured

    @property
    def per_example(self) -> NDArray[np.float64] | None:
        """By which the intervals of differences are those of scores: resampled, where these can be."""
        one, other = self.of.per_example, self.beyond.per_example
        return None if one is None or other is None else one - other

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        return self.of.value(draw) - self.beyond.value(draw)


@dataclass(frozen=True)
class _Task:
    """What every system of an evaluation is asked."""

    examples: list[EvaluationExample]
    settings: EvaluationSettings
    sampling: Sampling
    metrics: Sequence[Metric]
    prompt_format: PromptFormat | None
    """How prompts are put, where it is not as the tokenizer has it."""
    train_on: TrainOn
    reporter: Reporter


@dataclass(frozen=True)
class _System:
    """What was found of one model."""

    outputs: list[Output]
    likelihoods: list[TextLikelihood]
    scores: list[Score]
    summary: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase


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
    weights = weights_sha256(locate_model(str(run)).path)
    folder = RunFolder(Path(run))
    recipe = folder.recipe() if folder.recipe_file.is_file() else None
    target = evaluation_folder(folder if recipe else None, _name_of(data), name, out)
    texts = read_examples(data, recipe.data if recipe else None)
    trained = read_trained(recipe.data if recipe else None, folder.manifest()["data"]["files"] if recipe else {})
    examples, leakage, notes = _examples(texts, trained, settings)
    metrics = _metrics(examples, texts.plain, settings, trained, notes)
    train_on = recipe.data.train_on if recipe else "all"
    task = _Task(examples, settings, sampling, metrics, "raw" if texts.plain else None, train_on, reporter)
    about = {
        "model": {"name": str(run), "weights": weights},
        "data": {"files": texts.files, "rows": texts.rows, "examples": len(examples)},
        "settings": _recorded(data, settings, sampling),
    }
    check_folder(target, about)
    base = base or (target / "base" / SUMMARY).is_file()
    below = base_name(str(run), recipe) if base else None
    reporter.say(f"{texts.rows:,} rows of test data, {len(examples):,} examples")
    for line in notes:
        reporter.say(line)
    system = _evaluated(task, about, load_model(str(run)))
    summary = system.summary | {"leakage": leakage, "notes": [*notes, *system.summary["notes"]]}
    if below:
        reporter.say(f"The same with {below}, which the run was trained from")
        about |= {"model": {"name": below, "weights": weights_sha256(locate_model(below).path)}}
        precision = system.summary["model"]["precision"]
        other = _evaluated(task, about, load_base(below, precision, system.tokenizer, folder))
        _write(target / "base", other, other.summary)
        summary["base"] = {
            "model": other.summary["model"],
            "metrics": other.summary["metrics"],
            "differences": _differences(system.scores, other.scores, len(examples)),
        }
    _write(target, system, summary)
    return target


def evaluation_folder(run: RunFolder | None, default: str, name: str | None, out: str | Path | None) -> Path:
    """Where an evaluation goes: `out`, or `name`, else `default`, among the evaluations of the run."""
    if out is not None:
        if name is not None:
            raise RecipeError("`name` and `out` both say where the evaluation goes; give one.")
        return Path(out)
    if run is None:
        raise RunError("This is a model and no run folder: say where the evaluation goes with --out DIR.")
    name = default if name is None else name
    if name != Path(name).name or name in (".", ".."):
        raise RecipeError(f"`name` {name!r} should be the name of a folder; --out takes a path.")
    return run.path / "evaluations" / name


def _name_of(data: EvaluationData | Items) -> str:
    source = data.source[0] if isinstance(data, EvaluationData) and data.source else "texts"
    return Path(source).name.partition(".")[0] or "texts"


def _examples(
    texts: EvaluationTexts, trained: Trained, settings: EvaluationSettings
) -> tuple[list[EvaluationExample], dict[str, Any], list[str]]:
    """The examples to evaluate, what of the test data was trained, and what is to be said of that."""
    examples = texts.examples
    total = len(examples)
    seen = [str(example.origin) for example in examples if trained.holds(example)]
    asked = [str(example.origin) for example in examples if trained.asks(example) and not trained.holds(example)]
    left_out = bool(seen) and settings.exclude_trained
    if left_out:
        examples = [example for example in examples if not trained.holds(example)]
    notes = []
    if trained.missing:
        notes.append(f"Whether test rows were trained is not known: {trained.missing}.")
    if seen:
        flatter = "make the scores look better than they are (--exclude-trained leaves them out)"
        done = "are left out" if left_out else flatter
        notes.append(f"{len(seen):,} of {total:,} examples were trained and {done}: {_named(seen)}")
    if asked:
        notes.append(f"{len(asked):,} of {total:,} prompts were trained with other answers: {_named(asked)}")
    if not examples:
        raise DataError("All examples of the test data were trained, so that nothing is left to evaluate.")
    leakage = {"trained": seen, "left_out": left_out, "prompts_trained": asked, "missing": trained.missing}
    return examples[: settings.limit], leakage, notes


def _metrics(
    examples: Sequence[EvaluationExample],
    plain: bool,
    settings: EvaluationSettings,
    trained: Trained,
    notes: list[str],
) -> list[Metric]:
    """What is measured on the outputs. Raises `DataError` for a metric that needs references which are not there."""
    bare = [str(example.origin) for example in examples if not example.references]
    if bare and len(bare) < len(examples) and settings.metrics is None:
        notes.append(
            f"{len(bare):,} of {len(examples):,} examples have no reference ({_named(bare)}), so that nothing is "
            "compared with references."
        )
    names = settings.metrics
    wanted = [name for name in names or COPIED if name in COPIED]
    if names is not None:
        names = [name for name in names if name not in COPIED]
    # how a text happens to go on is no reference by which other ways could be judged, unless somebody asks for that
    metrics = metrics_for(settings.language, names, names is not None or not (bare or plain))
    needing = [metric.name for metric in metrics if metric.needs_references]
    if needing and bare:
        raise DataError(
            f"{', '.join(needing)}: needs references, and {len(bare):,} of {len(examples):,} examples have none: "
            f"{_named(bare)}. Give each a reference, or choose other --metrics."
        )
    if wanted and trained.texts:
        metrics += [metric for metric in Novelty(trained.answers()).metrics if metric.name in wanted]
    elif wanted and settings.metrics is not None:
        raise DataError(f"{', '.join(wanted)}: cannot be measured, for {trained.missing}.")
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


def check_folder(target: Path, about: Mapping[str, Any]) -> None:
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


def base_name(run: str, recipe: Recipe | None) -> str:
    """The model that a run was trained from. Raises `RunError` for what is no run."""
    if recipe is None:
        raise RunError(f"{run}: is no run folder, so that it is not known which model it was trained from.")
    return recipe.model


def load_base(name: str, precision: Precision, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> LoadedModel:
    """The model that a run was trained from, to be asked as the run is. Raises `RunError` where it is another now."""
    below = load_model(name, precision)
    if weights_sha256(below.base_path) != run.manifest()["base"]["sha256"]:
        raise RunError(f"{name}: its weights are not those that {run.path} was trained from.")
    below.tokenizer = tokenizer
    grow_vocabulary(below)
    return below


def described(loaded: LoadedModel) -> dict[str, Any]:
    """What a summary says of a model beside its name and weights."""
    return {
        "base": loaded.base_name,
        "parameters": loaded.causal_lm.num_parameters(),
        "precision": str(loaded.causal_lm.dtype).removeprefix("torch."),
    }


def _evaluated(task: _Task, about: Mapping[str, Any], loaded: LoadedModel) -> _System:
    """What a model writes for the examples, and how good that is."""
    encoder = Encoder(loaded.tokenizer, task.prompt_format, task.train_on)
    by = computed_by(loaded, encoder, about["model"]["weights"])
    prompts, sequences = _encoded(task, encoder, loaded.context_length)
    kept = Kept("outputs", [by, task.sampling.model_dump(exclude_defaults=True)])
    with task.reporter.counting("Writing", "texts") as count:
        written = write_all(loaded, encoder, prompts, task.sampling, kept, lambda done: count(done, len(prompts)))
    outputs = outputs_of(task.examples, written)
    found, scores = _likelihood(task, loaded, encoder, sequences, by)
    for metric in task.metrics:
        measured = metric.measure(outputs)  # a signature is complete behind that
        scores.append(Score(metric.name, metric.better, metric.signature, measured))
    summary = {
        **about,
        "model": about["model"] | described(loaded),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": _notes(outputs),
        "metrics": [_with_interval(score, len(outputs)) for score in scores],
    }
    return _System(outputs, found, scores, summary, loaded.tokenizer)


def computed_by(loaded: LoadedModel, encoder: Encoder, weights: str) -> list[Any]:
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
) -> tuple[list[TextLikelihood], list[Score]]:
    """The likelihood of each example, with perplexity and bits per byte; none where nothing is to be predicted."""
    settings = task.settings
    total = sum(map(len, sequences))
    if not total:
        return [], []
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
    return found, [
        Score("perplexity", "lower", f"{of}|tokens:own", perplexity_of(found)),
        Score("bits per byte", "lower", of, bits_per_byte_of(found)),
    ]


def _with_interval(score: Score, examples: int) -> dict[str, Any]:
    """A score as summary.json has it."""
    return {
        "name": score.name,
        **interval(score.measured, examples=examples).to_json(),
        "signature": score.signature,
        "better": score.better,
    }


def _notes(outputs: Sequence[Output]) -> list[str]:
    """What is striking about the outputs themselves."""
    found = {
        "are empty": [output.origin for output in outputs if not output.text.strip()],
        "did not end by themselves and were cut": [
            output.origin for output in outputs if output.finish_reason == "length"
        ],
        "end in a loop": [output.origin for output in outputs if ends_in_loop(tokens(output.text))],
    }
    return [
        f"{len(origins):,} of {len(outputs):,} outputs {what}: {_named(origins)}"
        for what, origins in found.items()
        if origins
    ]


def _named(origins: Sequence[str]) -> str:
    """The first of `origins`; a file that all are in is named once."""
    first, more = origins[:NAMED], ", …" if len(origins) > NAMED else ""
    files, rows = zip(*(origin.rsplit(", row ", 1) for origin in first), strict=True)
    if len(first) > 1 and len({*files}) == 1:
        return f"{files[0]}, rows {', '.join(rows)}{more}"
    return "; ".join(first) + more


def _differences(scores: Sequence[Score], base: Sequence[Score], examples: int) -> list[dict[str, Any]]:
    """What the run is ahead of its base in each metric, with the interval from the same draws of examples for both."""
    of_base = {score.name: score.measured for score in base}
    found = []
    for score in scores:
        ahead = interval(MeasuredDifference(score.measured, of_base[score.name]), examples=examples)
        found.append({"name": score.name, **ahead.to_json()})
    return found


def _write(target: Path, system: _System, summary: Mapping[str, Any]) -> None:
    """Fills the folder; the summary makes it an evaluation. Raises `DataError` where outputs that are there already are
    not these."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be created ({error.strerror}).") from None
    lines = [output_line(output) for output in system.outputs]
    if (target / SUMMARY).is_file():
        _check_unchanged(target / "outputs.jsonl", lines)
    write_text(target / "outputs.jsonl", "".join(line + "\n" for line in lines))
    write_jsonl(target / "scores.jsonl", (_scores_of(index, system) for index in range(len(lines))))
    write_json(target / SUMMARY, summary)
    write_evaluation(target)


def _scores_of(index: int, system: _System) -> dict[str, Any]:
    """A line of scores.jsonl; the likelihood in the numbers that corpus scores are sums of."""
    columns = {score.name: score.measured.per_example for score in system.scores}
    scores = {name: float(column[index]) for name, column in columns.items() if column is not None}
    line: dict[str, Any] = {"index": index, "scores": {k: v for k, v in scores.items() if math.isfinite(v)}}
    return line | ({"likelihood": asdict(system.likelihoods[index])} if system.likelihoods else {})


def _check_unchanged(file: Path, lines: Sequence[str]) -> None:
    there = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.is_file() else []
    for number in range(max(len(there), len(lines))):
        if there[number : number + 1] != list(lines[number : number + 1]):
            raise DataError(
                f"{file}, line {number + 1}: is not what the model wrote; the file was changed by hand. Keep it under "
                "another name if it is of use, and remove the folder to have it written anew."
            )
