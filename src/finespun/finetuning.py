"""A run from its recipe to its report. Everything that can be known before the first step is checked before anything
is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from finespun.data.check import changed_since_check
from finespun.data.formats import Asked, prompt_of
from finespun.data.prepare import Tokens, encode_texts, encoder_for
from finespun.data.sources import Items, MemoryRows, read_standard_input, to_jsonl
from finespun.data.templates import Encoder, TokenizedExample
from finespun.data.texts import HELD_OUT, Texts, read_texts
from finespun.errors import DataError, OutOfMemory, RecipeError, RunError, TrainingInterrupted
from finespun.evaluation.during_training import SampleEvaluation, sample_evaluation
from finespun.evaluation.perplexity import perplexity, perplexity_ratio
from finespun.files import copy_file, data_cache, hash_of, remembered, write_text
from finespun.generation.engine import generate
from finespun.generation.settings import Sampling
from finespun.models.adapters import unroll_pissa
from finespun.models.catalog import locate, weights_sha256
from finespun.models.compilation import can_compile
from finespun.models.load import (
    LoadedModel,
    faster_precision,
    grow_vocabulary,
    load_model,
    save_model,
)
from finespun.models.trainable import make_trainable
from finespun.recipe import VALIDATION_LOSS, Recipe, TrainingRecipe, changed_keys
from finespun.reports.training import LENGTH_ACTIONS, write_report
from finespun.runs import RunFolder, default_out, environment
from finespun.training.checkpoint import Checkpoint, newest_checkpoint
from finespun.training.loop import (
    Evaluation,
    ExampleLosses,
    ResolvedTraining,
    example_losses,
    tokens_per_second,
    train,
)
from finespun.training.memory import MemoryPlan, plan_memory, tune_memory_use
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.optim import update_seconds
from finespun.training.progress import Reporter, duration
from finespun.training.rate_search import STEPS, chart, search_rate
from finespun.training.schedule import Speed, default_batch_size, default_learning_rate, settle
from finespun.training.trackers import Trackers, check_installed

Sample = dict[str, Any]

SURELY_TOO_MUCH = 1.15
"""A run whose memory is estimated at so many times what there is, is refused: the estimate is not further off."""


@dataclass
class FinishedRun:
    """A run's folder and its model, as it was trained, in memory."""

    folder: RunFolder
    loaded: LoadedModel
    encoder: Encoder


@dataclass
class _Prepared:
    """What is settled before a run writes anything."""

    recipe: Recipe
    texts: Texts
    tokens: Tokens
    loaded: LoadedModel
    encoder: Encoder
    objective: CausalLM
    evaluation: SampleEvaluation | None
    steps: int
    memory: MemoryPlan
    manifest: dict[str, Any]
    weights: list[str]
    """SHA-256 of all that the model was loaded from."""


def finetune(recipe: Recipe, items: Items | None = None, reporter: Reporter | None = None) -> FinishedRun:
    """Runs `recipe` into a new run folder; `items`, texts or dicts of columns, take the place of the recipe's source.

    Raises the errors of `finespun.errors`; those before the first step leave nothing behind.
    """
    reporter = reporter or Reporter()
    recipe = recipe.model_copy(deep=True)
    name = Path(recipe.data.source[0]).stem if items is None and recipe.data.source else "texts"
    folder = RunFolder(Path(recipe.out) if recipe.out else default_out(name))
    folder.check_free()
    if items is None and recipe.data.source == ["-"]:
        items = read_standard_input(recipe.data.documents, recipe.data.encoding)
    texts = read_texts(recipe.data, items)
    recipe.out = str(folder.path.absolute())
    if items is not None:
        recipe.data.source = [str(folder.data.absolute())]
    run = _prepare(recipe, texts, reporter)
    _check_fits(run)
    if items is not None:
        files = run.manifest["data"]["files"]
        files[str(folder.data.absolute())] = files.pop(MemoryRows.shown)
    folder.create(recipe, run.manifest)
    with folder.held():
        copy_file(run.tokens.folder / "dropped.jsonl", folder.dropped)
        if items is not None:
            write_text(folder.data, to_jsonl(items))
        return _run(run, folder, reporter, resume_from=None)


def resume(
    path: str | Path,
    reporter: Reporter | None = None,
    changes: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
) -> FinishedRun:
    """Goes on with the run in `path` from its newest complete checkpoint, or from its start where it has none.

    `changes` are keys of the recipe to override. Raises `RunError` for a folder without a run, a finished run, one that
    another process trains, and, unless `allow_changes`, for a recipe, data or base weights that are not those it began
    with.
    """
    folder = RunFolder(Path(path))
    recipe = folder.recipe(changes or {})
    with folder.held():
        return _resume(folder, recipe, reporter or Reporter(), allow_changes)


def _resume(folder: RunFolder, recipe: Recipe, reporter: Reporter, allow_changes: bool) -> FinishedRun:
    recipe.out = str(folder.path.absolute())
    if folder.report.exists():
        raise RunError(f"{folder.path}: this run is finished. To train on, start a new run with --model {folder.path}.")
    recorded = folder.manifest()
    different = changed_keys(Recipe.parse(recorded["recipe"]), recipe)
    if different and not allow_changes:
        _refuse(folder, different)
    run = _prepare(recipe, read_texts(recipe.data), reporter)
    for part, key, what in (("data", "files", "data file"), ("base", "sha256", f"weights of {recipe.model}")):
        different += _differences(what, recorded[part][key], run.manifest[part][key])
    if different and not allow_changes:
        _refuse(folder, different)
    checkpoint = newest_checkpoint(folder.checkpoints)
    done = checkpoint.state.recorded if checkpoint else 0
    run.manifest["started"] = recorded["started"]
    run.manifest["changes"] = [
        *recorded.get("changes", []),
        *({"after_step": done, "what": each} for each in different),
    ]
    folder.keep_metrics_through(done)
    folder.create(recipe, run.manifest)
    for line in different:
        reporter.say(f"Changed: {line}")
    reporter.say(f"Going on after step {checkpoint.state.step if checkpoint else 0} of {run.steps}.")
    return _run(run, folder, reporter, resume_from=checkpoint)


def find_learning_rate(recipe: Recipe, reporter: Reporter | None = None) -> list[str]:
    """A drawing of the loss against a rising learning rate, and the rate that it suggests, in lines for a person.
    Writes nothing. Raises what `finetune` would raise before its first step, and `TrainingDiverged`."""
    reporter = reporter or Reporter()
    recipe = recipe.model_copy(deep=True)
    run = _prepare(recipe, read_texts(recipe.data), reporter)
    _check_fits(run)
    with reporter.counting("Trying learning rates", "steps") as count:
        search = search_rate(
            run.objective,
            run.tokens.train,
            ResolvedTraining.from_recipe(recipe, run.steps),
            lambda step, rate, loss: count(step, STEPS),
        )
    return [
        "Loss against learning rate:",
        *chart(search),
        f"Suggested: --training.learning-rate {search.suggested:g} (a tenth of the rate with the lowest loss).",
    ]


def _check_fits(run: _Prepared) -> None:
    """Raises `OutOfMemory` for what is clearly too much; what may just fit is tried."""
    memory = run.memory
    if memory.total > SURELY_TOO_MUCH * memory.available:
        raise OutOfMemory(
            f"This needs about {memory.total / 1e9:.1f} GB of memory and {memory.available / 1e9:.1f} GB are there (by "
            f"part: finespun train … --plan). {'; '.join(memory.remedies(run.recipe.training))}."
        )


def _refuse(folder: RunFolder, different: Sequence[str]) -> NoReturn:
    raise RunError(
        f"{folder.path}: the run would not go on as it began: {'; '.join(different)}. Undo that, start a new run, or "
        "go on all the same with --allow-changes."
    )


def _differences(what: str, before: Any, now: Any) -> list[str]:
    """What is not the same in two hashes, or in two mappings of hashes."""
    if not isinstance(before, Mapping):
        return [] if before == now else [f"the {what} changed"]
    return [f"the {what} {name} changed" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def plan(recipe: Recipe, reporter: Reporter | None = None) -> list[str]:
    """What `recipe` would train, in lines for a person: parameters, steps, tokens, memory by part, time. Writes
    nothing. Raises what `finetune` would raise before its first step."""
    recipe = recipe.model_copy(deep=True)
    run = _prepare(recipe, read_texts(recipe.data), reporter or Reporter())
    settings, tokens = recipe.training, run.tokens
    passes = run.steps / ceil(tokens.drawn / (settings.batch_size or 1))
    trained = passes * int(tokens.train.lengths.sum())
    validations = run.steps // (settings.validate_every or run.steps)
    speed = _speed(run.objective, tokens.train, settings)
    steady = trained / speed.seconds(run.steps, trained)
    seconds = speed.seconds(run.steps, trained, validations * int(tokens.validation.lengths.sum()))
    sample, every = run.evaluation, recipe.evaluation.every or run.steps
    return [
        f"{run.steps} steps over {trained:,.0f} tokens, with {validations} validations, at {steady:,.0f} tokens a "
        f"second: about {duration(seconds)}.",
        *([f"Beside that, {ceil(run.steps / every)} evaluations on {len(sample.prompts)} prompts."] if sample else []),
        "Memory:",
        *run.memory.lines(),
        *(run.memory.remedies(settings) if run.memory.total > run.memory.available else []),
    ]


def _prepare(recipe: Recipe, texts: Texts, reporter: Reporter) -> _Prepared:
    """Reads, encodes and decides all that can fail before a step; completes `recipe`."""
    tune_memory_use()
    for line in (*texts.how, *texts.notes, *changed_since_check(texts.files)):
        reporter.say(line)
    location = locate(recipe.model)
    if Path(recipe.model).exists():
        recipe.model = str(Path(recipe.model).absolute())
    once = " (converted once, about a minute)" if location.kind == "package" else ""
    reporter.say(f"Loading {recipe.model} from {location.path}{once}")
    settings = recipe.training
    check_installed(settings.trackers or [])
    loaded = load_model(recipe.model, precision="float32", four_bits=settings.method == "qlora")
    encoder = encoder_for(texts, loaded.tokenizer, recipe.data)
    new_tokens = grow_vocabulary(loaded)
    parameters = loaded.causal_lm.num_parameters()
    weights = [weights_sha256(path) for path in (loaded.base_path, *([location.path] if loaded.has_adapter else []))]
    trainable = make_trainable(loaded, recipe, new_tokens)
    tokens = encode_texts(texts, encoder, recipe.data, loaded.context_length)
    evaluation = sample_evaluation(recipe.evaluation, texts, encoder, loaded.context_length, settings.seed)
    objective = CausalLM(loaded.model)
    memory, steps, why_rate = _settle_training(settings, objective, tokens, parameters)
    manifest = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": _describe(texts, tokens, recipe),
        "base": {
            "name": loaded.base_name,
            "sha256": weights[0],
            "parameters": parameters,
        },
        "seed": recipe.training.seed,
        "recipe": recipe.model_dump(exclude_none=True),
        "environment": environment(),
    }
    for line in _summary(manifest["data"]):
        reporter.say(line)
    reporter.say(
        f"{trainable / 1e6:.1f} M parameters to train ({settings.method}, {settings.precision}): {steps} steps, "
        f"batch size {settings.batch_size}, learning rate up to {settings.learning_rate:g}"
        + (f" ({why_rate})" if why_rate else "")
    )
    if objective.why_slow:
        reporter.say(f"Examples are computed one by one, since {objective.why_slow}.")
    return _Prepared(recipe, texts, tokens, loaded, encoder, objective, evaluation, steps, memory, manifest, weights)


def _settle_training(
    settings: TrainingRecipe, objective: CausalLM, tokens: Tokens, parameters: int
) -> tuple[MemoryPlan, int, str]:
    """Decides what `settings` leaves open; returns the memory that it takes, the number of steps, and the reason for
    the learning rate where none was given."""
    device = objective.model.device
    settings.precision = settings.precision or faster_precision(device)
    if settings.compile and not can_compile(device):
        raise RecipeError("training.compile: needs Triton on a GPU, or a C++ compiler (g++, clang++) on a CPU.")
    why_rate = ""
    if settings.learning_rate is None:
        settings.learning_rate, why_rate = default_learning_rate(settings.method, settings.optimizer, parameters)
    settings.batch_size = settings.batch_size or default_batch_size(tokens.drawn)
    memory = plan_memory(objective, tokens.train, settings, longest=int(tokens.train.lengths.max()))
    settings.micro_batch_tokens = memory.micro_batch_tokens
    steps = settle(
        settings,
        examples=tokens.drawn,
        tokens=int(tokens.train.lengths.sum()),
        validation_tokens=int(tokens.validation.lengths.sum()),
        measure_speed=lambda: _speed(objective, tokens.train, settings),
    )
    return memory, steps, why_rate


def _run(run: _Prepared, folder: RunFolder, reporter: Reporter, resume_from: Checkpoint | None) -> FinishedRun:
    """Measures, trains, measures again and writes the model and the report."""
    done = resume_from.state.recorded if resume_from else 0
    names, settings = run.recipe.training.trackers or [], run.manifest["recipe"]
    try:
        with Trackers(names, folder.path, settings, reporter.say, done) as trackers:
            return _train_and_write(run, folder, reporter, resume_from, trackers)
    except TrainingInterrupted as stop:
        raise TrainingInterrupted(f"{stop} Go on with: finespun train --resume {folder.path}") from None


def _train_and_write(
    run: _Prepared, folder: RunFolder, reporter: Reporter, resume_from: Checkpoint | None, trackers: Trackers
) -> FinishedRun:
    recipe, loaded, tokens, objective = run.recipe, run.loaded, run.tokens, run.objective
    training = ResolvedTraining.from_recipe(recipe, run.steps)
    before, samples = _measured_before(run, training.micro_batch_tokens, reporter)
    folder.write_samples(samples)

    def record(metrics: dict[str, Any]) -> None:
        folder.append_metrics(metrics)
        trackers.log(metrics)

    state, best = train(
        loaded.model,
        objective,
        tokens.train,
        tokens.validation,
        training,
        folder.checkpoints,
        record,
        reporter,
        resume_from,
        tokens.mixture,
        _evaluation(run),
    )
    if loaded.pissa_start:
        loaded.model = unroll_pissa(loaded.model, loaded.pissa_start, recipe.lora)
        loaded.pissa_start = None
    save_model(loaded, run.encoder.stop_ids, folder.model)
    if tokens.validation:
        losses, weights = before
        after, _ = best or example_losses(objective, tokens.validation, training.micro_batch_tokens)
        run.manifest["results"] = {
            "best_step": state.best_step,
            "best_by": state.best_by,
            "perplexity_before": asdict(perplexity(losses, weights)),
            "perplexity_after": asdict(perplexity(after, weights)),
            "perplexity_ratio": asdict(perplexity_ratio(losses, after, weights)),
        }
        folder.write_manifest(run.manifest)
    reporter.say("Writing samples and the report")
    folder.write_samples(_write_out(samples, "after", run))
    write_report(folder)
    return FinishedRun(folder, loaded, run.encoder)


def _evaluation(run: _Prepared) -> Evaluation | None:
    """What the loop is to measure beside the losses."""
    asked, sample = run.recipe.evaluation, run.evaluation
    if sample is None or asked.every is None:
        return None
    return Evaluation(
        asked.every,
        lambda stopped: sample.scores(run.loaded, run.encoder, stopped),
        asked.best_by,
        higher=asked.best_by != VALIDATION_LOSS and sample.metrics[asked.best_by].better == "higher",
    )


def _measured_before(run: _Prepared, micro_batch_tokens: int, reporter: Reporter) -> tuple[ExampleLosses, list[Sample]]:
    """What the model makes of the held-out examples before it is trained. That is kept, for a run is often started
    again, with another learning rate or after an interruption, from the same weights with the same texts."""
    loaded = run.loaded
    computed_by = [str(loaded.device), str(loaded.causal_lm.dtype), torch.__version__, version("transformers")]
    asked = run.recipe.samples.model_dump()
    place = data_cache() / "before" / f"{hash_of([run.weights, run.tokens.folder.name, asked, computed_by])}.json"

    def measure() -> dict[str, Any]:
        reporter.say("Measuring the model as it is")
        losses = example_losses(run.objective, run.tokens.validation, micro_batch_tokens)
        return {"losses": losses, "samples": _write_out(_sample_prompts(run), "before", run)}

    kept = remembered(place, measure)
    return tuple(kept["losses"]), kept["samples"]


def _speed(objective: CausalLM, examples: Sequence[TokenizedExample], recipe: TrainingRecipe) -> Speed:
    """How fast the run trains in its own precision."""
    dtype = getattr(torch, recipe.precision or "float32")
    computing = objective.computing_in(dtype)
    return Speed(
        tokens_per_second(computing, examples, recipe.batch_size or 1, recipe.micro_batch_tokens or 1),
        update_seconds(objective.outer, recipe.optimizer, dtype, recipe.ema_decay),
    )


def _sample_prompts(run: _Prepared) -> list[Sample]:
    """Prompts for the report: the recipe's own, or the first of the held-out examples with what stands there; of those
    that ask the same, one."""
    if run.recipe.samples.prompts:
        return [{"prompt": prompt, "reference": None} for prompt in run.recipe.samples.prompts]
    found: list[Asked] = []
    for _, example in run.texts.examples(HELD_OUT):
        if len(found) == run.recipe.samples.count:
            break
        asked = prompt_of(example)
        known = any((other.prompt, other.tools) == (asked.prompt, asked.tools) for other in found)
        # of the examples that the length limit cut, not every prompt leaves room for an answer
        if not known and _leaves_room(asked, run):
            found.append(asked)
    return [asked._asdict() for asked in found]


def _leaves_room(asked: Asked, run: _Prepared) -> bool:
    """Whether an answer fits behind the prompt, and the prompt is one for this model at all: a row that its template
    refuses may have been left out of training."""
    try:
        return len(run.encoder.encode_prompt(asked.prompt, asked.tools)) < run.loaded.context_length
    except DataError:
        return False


def _write_out(samples: Sequence[Sample], when: str, run: _Prepared) -> list[Sample]:
    """`samples` with what the model writes now, greedily, under the key `when`."""
    sampling = Sampling(max_new_tokens=run.recipe.samples.max_new_tokens)
    prompts = [run.encoder.encode_prompt(sample["prompt"], sample.get("tools")) for sample in samples]
    written = generate(run.loaded, run.encoder, prompts, sampling) if prompts else []
    return [
        {**sample, when: completion.text, f"{when}_finish_reason": completion.finish_reason}
        for sample, (completion,) in zip(samples, written, strict=True)
    ]


def _describe(texts: Texts, tokens: Tokens, recipe: Recipe) -> dict[str, Any]:
    """What the data is, for manifest and report."""
    lengths = tokens.train.lengths
    counts, edges = np.histogram(lengths, bins=min(30, len(np.unique(lengths))))
    return {
        "files": texts.files,
        "format": texts.judged.format,
        "shape": texts.judged.shape,
        "prompt_format": recipe.data.prompt_format,
        "read": len(texts.judged.sides),
        "dropped": tokens.dropped,
        "train": len(tokens.train),
        "validation": len(tokens.validation),
        "train_tokens": int(lengths.sum()),
        "train_loss_tokens": int(tokens.train.trained.sum()),
        "validation_loss_tokens": int(tokens.validation.trained.sum()),
        "length_median": int(np.median(lengths)),
        "length_max": tokens.lengths.longest,
        "length_histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]},
        "max_length": recipe.data.max_length,
        "too_long": tokens.lengths.count,
        "too_long_action": tokens.lengths.too_long,
        "tokens_lost": tokens.lengths.tokens_lost,
    }


def _summary(data: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{data['train']} training and {data['validation']} validation examples ({data['shape']}, "
        f"prompted {data['prompt_format']}); "
        f"{data['train_tokens']:,} training tokens, {data['train_loss_tokens']:,} of them with loss; "
        f"longest {data['length_max']}, limit {data['max_length']}"
    ]
    if data["too_long"]:
        done = LENGTH_ACTIONS[data["too_long_action"]]
        lines.append(
            f"{data['too_long']} examples longer than {data['max_length']} tokens were {done}; "
            f"{data['tokens_lost']:,} tokens are not trained."
        )
    return lines


def closing_words(folder: RunFolder) -> list[str]:
    """What a finished run has to say: samples before and after, perplexity, and what to do next."""
    lines = []
    for sample in folder.samples():
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        lines += [f"\n--- {prompt}", f"[before] {sample['before'].strip()}", f"[after]  {sample['after'].strip()}"]
    results = folder.manifest().get("results")
    if results:
        before, after, ratio = (results[f"perplexity_{key}"] for key in ("before", "after", "ratio"))
        lines.append(
            f"\nHeld-out perplexity {before['value']:.2f} [{before['low']:.2f}, {before['high']:.2f}] before, "
            f"{after['value']:.2f} [{after['low']:.2f}, {after['high']:.2f}] after: {_change(ratio)}"
        )
    lines += [f"Report: {folder.report}", f'Write with it: finespun generate {folder.path} "..."']
    return lines


def _change(ratio: Mapping[str, float]) -> str:
    """`0.6` with its interval → `40.0 % lower (95 % interval 38.1 to 41.7)`."""
    if ratio["low"] <= 1 <= ratio["high"]:
        return "no difference shown at the 95 % level"
    word = "lower" if ratio["value"] < 1 else "higher"
    value, *ends = (abs(1 - ratio[key]) * 100 for key in ("value", "low", "high"))
    return f"{value:.1f} % {word} (95 % interval {min(ends):.1f} to {max(ends):.1f})"
