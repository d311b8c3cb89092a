"""What webnlg.py, multi30k.py, dialogsum.py and tang.py share: train by a recipe, write the answers to a test set,
score them, and do the same with TRL for as many minutes.

Whatever is interrupted goes on with the same command: training from its newest checkpoint, writing from the last text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finespun.evaluation.comparison import interval
from finespun.evaluation.evaluate import evaluate
from finespun.evaluation.metrics import metrics_for
from finespun.evaluation.metrics.base import Metric
from finespun.evaluation.outputs import Output, read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling
from finespun.reports.figures import figure
from finespun.runs import RunFolder

RECIPES = Path(__file__).parents[1] / "recipes"
MAX_NEW_TOKENS = 160
TRL_SPEED_STEPS = 12


def parser_of(about: str, name: str) -> argparse.ArgumentParser:
    """What all of these scripts take; `about` is the script's own description."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--recipe", type=Path, default=RECIPES / f"{name}.yaml")
    return parser


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """What those take that write greedily and with beams, or train beside TRL."""
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--minutes", type=float)


def train(recipe: Path, out: Path, *options: str) -> Path:
    """The run in `out`: begun by `recipe` with `options`, gone on with, or finished already."""
    run = RunFolder(out)
    if run.recipe_file.is_file() and "results" in run.manifest():
        return out
    words = ["--resume", str(out)] if run.recipe_file.is_file() else [str(recipe), "--out", str(out), *options]
    subprocess.run([sys.executable, "-m", "finespun", "train", *words], check=True)
    return out


def minutes_of_training(run: Path) -> float:
    """What the steps took, by metrics.jsonl, without what lies between them."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return sum(step["tokens"] / step["tokens_per_second"] for step in steps if "tokens_per_second" in step) / 60


@dataclass(frozen=True)
class Written:
    """What a model wrote for a test set, and in how many minutes; few where it was there already."""

    outputs: list[Output]
    minutes: float


def write(model: Path, test: Path, name: str, sampling: Sampling, like: Path | None = None) -> Written:
    """What the model in `model` writes for the examples of `test`. Where it is no run, it is prompted as the run `like`
    was."""
    data = EvaluationData(source=[str(test)])
    out = None
    if like is not None:
        data.template = RunFolder(like).recipe().data.template
        out = model / "evaluations" / name
    settings = EvaluationSettings(metrics=["length"], likelihood="off")
    started = time.perf_counter()
    folder = evaluate(model, data, settings, sampling, name=None if out else name, out=out)
    return Written(read_outputs(folder / "outputs.jsonl"), (time.perf_counter() - started) / 60)


def with_interval(value: float, low: float, high: float) -> str:
    return f"{figure(value)} [{figure(low)}, {figure(high)}]"


def scores(outputs: Sequence[Output], metrics: Sequence[Metric]) -> dict[str, str]:
    """Each metric with its 95 % interval; what it was measured with goes to stderr."""
    found = {}
    for metric in metrics:
        told = interval(metric.measure(outputs), examples=len(outputs))
        found[metric.name] = with_interval(told.value, told.low, told.high)
        print(f"  {metric.name}: {found[metric.name]}  ({metric.signature})", file=sys.stderr)
    return found


def named(metrics: Sequence[str], language: str) -> list[Metric]:
    return metrics_for(language, metrics, has_references=True)


def print_table(columns: Mapping[str, Mapping[str, str]]) -> None:
    """`columns` of the same rows, by name, as Markdown."""
    print("\n| | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |")


def rows_of(outputs: Sequence[Output], test: Path) -> list[dict[str, Any]]:
    """The row of `test` that each output is an answer to."""
    with test.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [rows[int(output.origin.rsplit("row ", 1)[1]) - 1] for output in outputs]


def written(arguments: argparse.Namespace, kind: str, metrics: Sequence[Metric]) -> Iterator[tuple[str, Path, Written]]:
    """Trains on `train.<kind>` and gives, for greedy decoding and for beams, its name, the test set and what was written
    for it. With --minutes it prints finespun beside TRL on `dev.<kind>` instead, and gives nothing."""
    training = arguments.data / f"train.{kind}"
    if arguments.minutes:
        beside_trl(
            arguments.recipe, training, arguments.data / f"dev.{kind}", arguments.out, arguments.minutes, metrics
        )
        return
    run = train(arguments.recipe, arguments.out, "--data.source", str(training))
    print(f"{run}: {minutes_of_training(run):.0f} minutes of training")
    test = arguments.data / f"{arguments.split}.{kind}"
    for decoding, beams in (("greedy", 1), (f"{arguments.beams} beams", arguments.beams)):
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, beams=beams)
        yield decoding, test, write(run, test, f"{arguments.split}-{decoding.replace(' ', '-')}", sampling)


def beside_trl(recipe: Path, data: Path, dev: Path, out: Path, minutes: float, metrics: Sequence[Metric]) -> None:
    """The recipe in about `minutes` of training and TRL in as many, both scored on `dev`, greedily."""
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    source = ("--data.source", str(data))
    ours = train(recipe, out / "finespun", *source, "--training.max-minutes", str(minutes))
    theirs = out / "trl"
    state = theirs / "trainer_state.json"
    if not state.is_file():
        train_with_trl(data, theirs, RunFolder(ours))
    seconds = json.loads(state.read_text(encoding="utf-8"))["log_history"][-1]["train_runtime"]
    answers = {
        f"finespun, {minutes_of_training(ours):.1f} min": write(ours, dev, "dev", sampling),
        f"TRL, {seconds / 60:.1f} min": write(theirs, dev, "dev", sampling, like=ours),
    }
    print_table({name: scores(answer.outputs, metrics) for name, answer in answers.items()})


def train_with_trl(data: Path, out: Path, ours: RunFolder) -> None:
    """TRL's `SFTTrainer` in bfloat16, packed, which is its fastest way on a CPU, on the prompts and completions that the
    recipe of `ours` makes, for as many minutes: a few steps say how many fit, then it takes those. Method, rank, peak
    rate, schedule, warm-up, and the chat template if there is one, are the recipe's; a step reads `max_length` tokens."""
    import jinja2
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finespun.models.load import load_model

    recipe = ours.recipe()
    assert recipe.data.template is not None  # the recipes of these tables have one
    tokenizer = AutoTokenizer.from_pretrained(ours.model)  # it holds the chat template, or none for raw texts
    parts = recipe.data.template.model_dump(exclude_none=True)
    filled = {part: jinja2.Template(source, keep_trailing_newline=True) for part, source in parts.items()}
    with data.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [
            {part: piece.render(json.loads(line)) for part, piece in filled.items()} for line in file
        ]
    if tokenizer.chat_template:
        roles = {"prompt": "user", "completion": "assistant"}
        rows = [{part: [{"role": roles[part], "content": text}] for part, text in row.items()} for row in rows]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def run(steps: int, clock: Clock) -> Any:
        loaded = load_model(recipe.model, "float32")
        lora = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules="all-linear")
        trainer = SFTTrainer(
            model=loaded.causal_lm.to(torch.bfloat16),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora if recipe.training.method == "lora" else None,
            args=SFTConfig(
                output_dir=str(out / "trainer"),
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=recipe.training.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=recipe.training.warmup,
                max_length=1024,
                packing=True,
                bf16=True,
                report_to="none",
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
            ),
            callbacks=[clock],
        )
        trainer.train()
        return trainer

    trial = Clock()
    run(TRL_SPEED_STEPS, trial)
    seconds = (trial.ends[-1] - trial.ends[0]) / (len(trial.ends) - 1)
    trainer = run(max(1, int(minutes_of_training(ours.path) * 60 / seconds)), Clock())
    model = trainer.model.merge_and_unload() if recipe.training.method == "lora" else trainer.model
    model.save_pretrained(out)
    trainer.processing_class.save_pretrained(out)
    trainer.state.save_to_json(str(out / "trainer_state.json"))
