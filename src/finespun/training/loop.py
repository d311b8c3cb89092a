"""The training loop, from the first step to the last, readable top to bottom.

A step is one update from one batch of examples. The batch is cut into micro-batches that fit into memory; each adds
Σ weight × loss / W to the gradient, W being the weight of the whole batch, so that how it was cut does not matter.
The model stays in evaluation mode: without dropout, a step is a function of weights, examples and rate, and what is
measured is what is trained.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from finespun.data.packing import micro_batches, pack, step_indices
from finespun.data.templates import TokenizedExample
from finespun.data.tokens import Share
from finespun.errors import FinespunError, OutOfMemory, TrainingDiverged, TrainingInterrupted
from finespun.models.compilation import compile_parts
from finespun.models.gradient_checkpointing import gradient_checkpointing
from finespun.recipe import VALIDATION_LOSS, Optimizer, Recipe, Schedule, TrainingRecipe
from finespun.training.checkpoint import Checkpoint, TrainingState, best_checkpoint, save_checkpoint
from finespun.training.memory import is_out_of_memory, memory_limit, smaller_micro_batch
from finespun.training.objectives.causal_lm import CausalLM, EmbeddingNoise
from finespun.training.optim import MasterOptimizer
from finespun.training.progress import Reporter
from finespun.training.schedule import learning_rate

SPEED_TOKENS = 600
"""Tokens on which the speed is measured."""

ExampleLosses = tuple[list[float], list[float]]
"""For each example Σ weight × loss in nats, and Σ weight."""


@dataclass(frozen=True)
class ResolvedTraining:
    """What the loop needs of a recipe, with nothing left open."""

    steps: int
    batch_size: int
    optimizer: Optimizer
    learning_rate: float
    schedule: Schedule
    warmup: float
    decay: float
    weight_decay: float
    max_gradient_norm: float
    neftune_alpha: float | None
    ema_decay: float | None
    early_stopping: int | None
    validate_every: int
    save_every: int
    keep_checkpoints: int
    micro_batch_tokens: int
    gradient_checkpointing: Literal["off", "selective", "full"]
    compile: bool
    memory_limit_gb: float | None
    compute_dtype: torch.dtype
    b_rate_ratio: float
    seed: int

    @classmethod
    def from_recipe(cls, recipe: Recipe, steps: int) -> ResolvedTraining:
        """Takes the fields of the same names; all of them must have been decided."""
        training = recipe.training
        values: dict[str, Any] = {
            name: getattr(training, name) for name in cls.__dataclass_fields__ if name in TrainingRecipe.model_fields
        }
        return cls(
            steps=steps,
            compute_dtype=getattr(torch, training.precision or "float32"),
            b_rate_ratio=recipe.lora.b_rate_ratio,
            **values,
        )


@dataclass(frozen=True)
class Evaluation:
    """What is measured of the model every so many steps, and at the last, beside the validation loss.

    `measure` gets a function that says whether the run is to stop, and then raises `TrainingInterrupted` soon; else it
    gives numbers by name. It draws no random numbers and leaves the model as it was. The best step is the one at which
    `best_by`, one of these numbers or the validation loss, is lowest or, where `higher` is better, highest.
    """

    every: int
    measure: Callable[[Callable[[], bool]], dict[str, float]]
    best_by: str = VALIDATION_LOSS
    higher: bool = False


def train(
    model: torch.nn.Module,
    objective: CausalLM,
    examples: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    recipe: ResolvedTraining,
    checkpoints: Path,
    on_step: Callable[[dict[str, Any]], None],
    reporter: Reporter,
    resume: Checkpoint | None = None,
    mixture: Sequence[Share] = (),
    evaluation: Evaluation | None = None,
) -> tuple[TrainingState, ExampleLosses | None]:
    """Trains the parameters of `model` that require a gradient; they end as those of the best checkpoint.

    Returns where the run stands and, if this call validated the best step, the validation losses of that step.
    `mixture` says how many of which examples an epoch takes, where it is not each once.
    `on_step` gets the metrics of each step. Checkpoints go to the folder `checkpoints`; with `resume` the run goes on
    from one of them, bit for bit as if it had not stopped. Raises `TrainingDiverged` for a loss or gradient that is
    not finite, and, after saving, `TrainingInterrupted` when SIGINT or SIGTERM came, `OutOfMemory` for an example that
    does not fit by itself, and whatever `evaluation` raises.
    """
    optimizer = MasterOptimizer(
        model, recipe.optimizer, recipe.weight_decay, recipe.compute_dtype, recipe.ema_decay, recipe.b_rate_ratio
    )
    if recipe.compile:
        compile_parts(objective.decoder)
    state = resume.state if resume else TrainingState()
    if resume:
        optimizer.load_state(resume.weights(), resume.moments())
    run = _Run(objective, optimizer, validation, recipe, checkpoints, reporter, evaluation, state)
    batches = step_indices(len(examples), recipe.batch_size, recipe.seed, state.step, mixture)
    steps_per_epoch = -(-(sum(share.draws for share in mixture) or len(examples)) // recipe.batch_size)

    with (
        stop_requests(reporter) as stop,
        memory_limit(recipe.memory_limit_gb),
        gradient_checkpointing(objective.decoder, recipe.gradient_checkpointing),
        reporter.start(state.recorded, recipe.steps),
    ):
        while run.state.unmeasured or not run.over:
            if not run.state.unmeasured:  # else the run was stopped while this step was being measured
                run.take_step([examples[index] for index in next(batches)], steps_per_epoch)
            metrics = run.measure(stop.is_set)
            on_step(metrics)
            reporter.step(metrics, recipe.steps)
            step = run.state.step
            if run.over or stop.is_set() or run.state.best_step == step or step % recipe.save_every == 0:
                run.save()
            if stop.is_set() and not run.over:
                raise TrainingInterrupted(f"Stopped after step {step} of {recipe.steps}, and saved.")

    state = run.state
    if state.best_step is not None and state.best_step != state.step:
        chosen = best_checkpoint(checkpoints, state)
        optimizer.load_state(chosen.weights(), chosen.moments())
    optimizer.settle()
    return state, run.best


@dataclass
class _Run:
    """What a run computes with, and where it stands."""

    objective: CausalLM
    optimizer: MasterOptimizer
    validation: Sequence[TokenizedExample]
    recipe: ResolvedTraining
    checkpoints: Path
    reporter: Reporter
    evaluation: Evaluation | None
    state: TrainingState
    best: ExampleLosses | None = None
    """The validation losses of the best step, where they were computed here."""

    def __post_init__(self) -> None:
        if self.state.best_by != self._best_by:  # a value of something else cannot be compared
            self.state = replace(self.state, best_by=self._best_by, best_step=None, best_value=None)

    @property
    def _best_by(self) -> str:
        return self.evaluation.best_by if self.evaluation else VALIDATION_LOSS

    @property
    def over(self) -> bool:
        """Whether no step is to be taken any more."""
        state, recipe = self.state, self.recipe
        judged = self.evaluation if self.evaluation and self._best_by != VALIDATION_LOSS else None
        every = judged.every if judged else recipe.validate_every
        worse_for = 0 if state.best_step is None else (state.step - state.best_step) // every
        return state.step >= recipe.steps or worse_for >= (recipe.early_stopping or recipe.steps)

    @property
    def _fitting(self) -> int:
        """Tokens that are computed at once."""
        return min(self.recipe.micro_batch_tokens, self.state.micro_batch_tokens or self.recipe.micro_batch_tokens)

    def take_step(self, batch: Sequence[TokenizedExample], steps_per_epoch: int) -> None:
        """One update. Raises `TrainingDiverged`, or `OutOfMemory` after saving."""
        started = time.perf_counter()
        recipe, step, size = self.recipe, self.state.step + 1, self._fitting
        noise = EmbeddingNoise(recipe.neftune_alpha, recipe.seed, step) if recipe.neftune_alpha else None
        try:
            loss, fitting = fitting_gradients(self.objective, self.optimizer, batch, size, noise)
        except OutOfMemory as error:
            if self.state.step:
                self.save()
            raise OutOfMemory(f"Step {step}: {error} {self.state.step} steps are saved.") from None
        if fitting < size:
            self.state = replace(self.state, micro_batch_tokens=fitting)
            self.reporter.say(
                f"Step {step} did not fit into memory and was taken in parts of at most {fitting} tokens."
            )
        rate = learning_rate(step - 1, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.schedule, recipe.decay)
        norm = self.optimizer.step(rate, recipe.max_gradient_norm) if isfinite(loss) else nan
        if not isfinite(norm):
            raise diverged(self.objective, batch, step, loss, norm, self.checkpoints)
        tokens = sum(len(example.input_ids) for example in batch)
        metrics: dict[str, Any] = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }
        self.state = replace(self.state, step=step, unmeasured=metrics)

    def measure(self, stopped: Callable[[], bool]) -> dict[str, Any]:
        """The metrics of the step that was taken, with all that is due to be measured after it. What the evaluation
        raises is raised after saving; the run then goes on with measuring."""
        step = self.state.step
        try:
            metrics, losses = self._measured(stopped)
        except Exception as error:
            self.save()
            match error:
                case TrainingInterrupted():
                    raise TrainingInterrupted(f"Stopped after step {step} of {self.recipe.steps}, and saved.") from None
                case FinespunError():
                    raise type(error)(f"After step {step}, which is saved: {error}") from error
            raise
        self.state = replace(self.state, unmeasured=None)
        value, before = metrics.get(self._best_by), self.state.best_value
        higher = self.evaluation is not None and self.evaluation.higher
        if value is not None and (before is None or (value > before if higher else value < before)):
            self.state, self.best = replace(self.state, best_step=step, best_value=value), losses
        return metrics

    def _measured(self, stopped: Callable[[], bool]) -> tuple[dict[str, Any], ExampleLosses | None]:
        step, evaluation = self.state.step, self.evaluation
        metrics, losses = dict(self.state.unmeasured or {}), None
        last = step == self.recipe.steps
        validates = len(self.validation) > 0 and (last or step % self.recipe.validate_every == 0)
        evaluates = evaluation is not None and (last or step % evaluation.every == 0)
        if not validates and not evaluates:
            return metrics, None
        with self.optimizer.evaluating():
            if validates:
                losses = example_losses(self.objective, self.validation, self._fitting, stopped)
                metrics[VALIDATION_LOSS] = weighted_mean(losses)
            if evaluation and evaluates:
                scores = evaluation.measure(stopped)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
                self.reporter.say(f"step {step}/{self.recipe.steps}  {shown}")
                metrics |= scores
        return metrics, losses

    def save(self) -> None:
        """Writes a checkpoint."""
        save_checkpoint(self.checkpoints, self.state, *self.optimizer.state(), keep=self.recipe.keep_checkpoints)


def fitting_gradients(
    objective: CausalLM,
    optimizer: MasterOptimizer,
    batch: Sequence[TokenizedExample],
    micro_batch_tokens: int,
    noise: EmbeddingNoise | None,
) -> tuple[float, int]:
    """What `accumulate_gradients` gives, from the beginning and in halves for as long as memory runs out, and the size
    at which it did not. Raises `OutOfMemory` where that is one example alone."""
    while True:
        try:
            return accumulate_gradients(objective, batch, micro_batch_tokens, noise), micro_batch_tokens
        except (MemoryError, RuntimeError) as error:
            optimizer.forget_gradients()
            if not is_out_of_memory(error):
                raise
        smaller = smaller_micro_batch(batch, micro_batch_tokens)
        if smaller is None:
            longest = max(batch, key=lambda example: len(example.input_ids))
            raise OutOfMemory(
                f"{longest.origin} with its {len(longest.input_ids)} tokens does not fit into memory by itself. Set "
                "training.gradient_checkpointing to full, lower data.max_length, or choose training.method lora."
            )
        micro_batch_tokens = smaller


def accumulate_gradients(
    objective: CausalLM,
    batch: Sequence[TokenizedExample],
    micro_batch_tokens: int,
    noise: EmbeddingNoise | None = None,
) -> float:
    """Adds the gradient of the batch's mean loss to the parameters; returns that loss, nats per unit of weight."""
    device = next(objective.model.parameters()).device
    total_weight = sum(_weight(example) for example in batch)
    loss = 0.0
    for group in micro_batches(batch, micro_batch_tokens):
        added = noise(group, objective.embedding_dim) if noise else None
        with objective.packing():  # the backward pass too, which may compute layers again
            result = objective(pack(group).to(device), loss_scale=1 / total_weight, noise=added)
            result.weighted_sum.backward()
        loss += float(result.weighted_sum.detach())
    return loss


def tokens_per_second(
    objective: CausalLM, examples: Sequence[TokenizedExample], batch_size: int, micro_batch_tokens: int
) -> float:
    """Speed of forward and backward passes here, measured on a few of `examples`; leaves no gradients behind."""
    chosen: list[TokenizedExample] = []
    while sum(len(example.input_ids) for example in chosen) < SPEED_TOKENS and len(chosen) < len(examples):
        chosen.append(examples[len(chosen)])
    accumulate_gradients(objective, chosen[:1], micro_batch_tokens)  # the first pass of a process is slower
    started = time.perf_counter()
    for first in range(0, len(chosen), batch_size):
        accumulate_gradients(objective, chosen[first : first + batch_size], micro_batch_tokens)
    seconds = time.perf_counter() - started
    objective.model.zero_grad(set_to_none=True)
    return sum(len(example.input_ids) for example in chosen) / seconds


@torch.no_grad()
def example_losses(
    objective: CausalLM,
    examples: Sequence[TokenizedExample],
    micro_batch_tokens: int,
    stopped: Callable[[], bool] = lambda: False,
) -> ExampleLosses:
    """For each example Σ weight × loss (nats) and Σ weight, in the order given, summed in float64. Raises
    `TrainingInterrupted` soon after `stopped` says so."""
    device = next(objective.model.parameters()).device
    examples = list(examples)  # of a store on disk each reading makes a new object
    sums: dict[int, float] = {}
    for group in micro_batches(examples, micro_batch_tokens):
        if stopped():
            raise TrainingInterrupted("Stopped while the validation loss was computed.")
        result = objective(pack(group).to(device))
        per_example = torch.zeros(len(group), dtype=torch.float64, device=device)
        per_example.index_add_(0, result.examples, (result.losses * result.weights).double())
        sums |= {id(example): value for example, value in zip(group, per_example.tolist(), strict=True)}
    return [sums[id(example)] for example in examples], [_weight(example) for example in examples]


def _weight(example: TokenizedExample) -> float:
    return float(example.loss_weights.sum(dtype=np.float64))


def weighted_mean(losses: ExampleLosses) -> float:
    """Σ weight × loss / Σ weight over all examples, nats."""
    sums, weights = losses
    return sum(sums) / sum(weights)


def diverged(
    objective: CausalLM, batch: Sequence[TokenizedExample], step: int, loss: float, norm: float, checkpoints: Path
) -> TrainingDiverged:
    """The error for a step whose loss or gradient is not finite, naming the examples that cause it where they do so
    one by one. The weights are as they were before the step."""
    sums, _ = example_losses(objective, batch, 1)
    culprits = [example for example, value in zip(batch, sums, strict=True) if not isfinite(value)]
    named = ", ".join(str(example.origin) for example in (culprits or batch)[:10])
    which = "These examples have no finite loss" if culprits else "Its examples"
    return TrainingDiverged(
        f"Step {step}: the loss is {loss} and the gradient's length {norm}, so the step was "
        "not taken and the run stopped. "
        f"{which}: {named}. Lower training.learning_rate, or look at these rows. "
        f"The last good checkpoint is in {checkpoints}."
    )


@contextmanager
def stop_requests(reporter: Reporter) -> Generator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, which is said; a second SIGINT interrupts at once. Outside the
    main thread, where Python takes no signals, the event is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()
        with suppress(RuntimeError):  # the signal came while a line was being written
            reporter.say("Stopping: what was computed is saved first. Ctrl-C once more stops at once, without saving.")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
