"""What benchmarks/webnlg.py and benchmarks/multi30k.py share: train by a recipe, write the answers to a test set, score
them, and do the same with TRL for as many minutes.

Whatever is interrupted goes on with the same command: training from its newest checkpoint, writing from the last text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finespun.evaluation.comparison import interval
from finespun.evaluation.evaluate import evaluate
from finespun.evaluation.metrics import metrics_for
from finespun.evaluation.outputs import Output, read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling
from finespun.runs import RunFolder


def train(recipe: Path, data: Path, out: Path, *options: str) -> Path:
    """The run in `out`, begun by `recipe` on `data`, gone on with, or finished already."""
    run = RunFolder(out)
    if run.recipe_file.is_file() and "results" in run.manifest():
        return out
    began = run.recipe_file.is_file()
    words = ["--resume", str(out)] if began else [str(recipe), "--data.source", str(data), "--out", str(out), *options]
    subprocess.run([sys.executable, "-m", "finespun", "train", *words], check=True)
    return out


def write(model: Path, test: Path, name: str, sampling: Sampling, like: Path | None = None) -> list[Output]:
    """What the model in `model` writes for the examples of `test`. Where it is no run, it is prompted as the run `like`
    was."""
    from finespun.recipe import TemplateRecipe

    data = EvaluationData(source=[str(test)])
    out = None
    if like is not None:
        template = RunFolder(like).recipe().data.template
        data.template = template and TemplateRecipe(**template.model_dump())
        out = model / "evaluations" / name
    settings = EvaluationSettings(metrics=["length"], likelihood="off")
    where = {"out": out} if out else {"name": name}
    return read_outputs(evaluate(model, data, settings, sampling, **where) / "outputs.jsonl")


def scores(outputs: Sequence[Output], metrics: Sequence[str], language: str) -> dict[str, str]:
    """Each metric with its 95 % interval, and what it was measured with."""
    found = {}
    for metric in metrics_for(language, metrics, has_references=True):
        told = interval(metric.measure(outputs), examples=len(outputs))
        found[metric.name] = f"{told.value:.2f} [{told.low:.2f}, {told.high:.2f}]"
        print(f"  {metric.name}: {found[metric.name]}  ({metric.signature})", file=sys.stderr)
    return found


def rows_of(outputs: Sequence[Output], test: Path) -> list[dict[str, Any]]:
    """The row of `test` that each output is an answer to."""
    with test.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [rows[int(output.origin.rsplit("row ", 1)[1]) - 1] for output in outputs]


def train_with_trl(data: Path, out: Path, minutes: float, template: Mapping[str, str], rate: float, batch: int) -> Path:
    """TRL's SFTTrainer in bfloat16, packed, for as many minutes: it takes 12 steps to see how many fit, then as many
    with a rate that falls to 0 as a cosine, as finespun does."""
    import jinja2
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finespun.models.load import load_model

    if (out / "config.json").is_file():
        return out
    filled = {part: jinja2.Template(source, keep_trailing_newline=True) for part, source in template.items()}
    with data.open(encoding="utf-8") as file:
        rows = [{part: piece.render(json.loads(line)) for part, piece in filled.items()} for line in file]

    def run(steps: int, output: Path) -> tuple[Any, list[float]]:
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        loaded = load_model("smollm2-135m", "float32")
        trainer = SFTTrainer(
            model=loaded.causal_lm.to(torch.bfloat16),
            processing_class=loaded.tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=SFTConfig(
                output_dir=str(output),
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_ratio=0.03,
                max_length=1024,
                packing=True,
                bf16=True,
                report_to="none",
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
            ),
            callbacks=[Clock()],
        )
        trainer.train()
        return trainer, ends

    _, ends = run(12, out / "trial")
    each = float(np.median(np.diff(ends)))
    trainer, _ = run(max(1, int(minutes * 60 / each)), out / "trainer")
    trainer.save_model(str(out))
    trainer.processing_class.save_pretrained(str(out))
    return out
