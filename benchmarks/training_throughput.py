"""Training speed beside TRL's SFTTrainer: same rows, same model, same number of optimizer steps, one after the other.

    python benchmarks/training_throughput.py --data train.jsonl [--rows 64] [--batch-size 8] [--repeat 2]

`--data` is a JSONL file with `prompt` and `completion`. Each contestant runs in a process of its own, in turn, so that a
machine that slows down slows all of them down. Speed is real tokens (no padding, context included) of all steps by the
wall time from the beginning of the first to the end of the last. What counts is the ratio; absolute numbers are of
this machine on this day.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 2e-4


def finespun(rows: list[dict[str, str]], batch_size: int, method: str) -> dict[str, float]:
    """finespun's loop, without validation."""
    from finespun.data.formats import PromptExample
    from finespun.data.readers import Origin
    from finespun.data.templates import Encoder
    from finespun.finetuning import make_trainable
    from finespun.models.load import faster_precision, load_model
    from finespun.recipe import Recipe
    from finespun.training.loop import ResolvedTraining, train
    from finespun.training.objectives.causal_lm import CausalLM
    from finespun.training.progress import Reporter
    from finespun.training.schedule import settle

    loaded = load_model("smollm2-135m", "float32")
    encoder = Encoder(loaded.tokenizer)
    examples = [encoder.encode_example(PromptExample(**row, origin=Origin("data", i)))[0] for i, row in enumerate(rows)]
    recipe = Recipe.from_keywords(
        method=method,
        epochs=1,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        save_every=10**9,
        precision=faster_precision(loaded.device),
    )
    make_trainable(loaded, recipe)
    tokens = sum(len(example.input_ids) for example in examples)
    steps = settle(recipe.training, len(examples), tokens, 0, 1, lambda: 0.0)
    started = time.perf_counter()
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            loaded.model,
            CausalLM(loaded.causal_lm),
            examples,
            [],
            ResolvedTraining.from_recipe(recipe.training, steps),
            Path(folder),
            lambda metrics: ends.append(time.perf_counter()),
            Reporter(quiet=True),
        )
    return {"tokens": tokens, "seconds": ends[-1] - started}


def trl(bf16: bool | None, packing: bool) -> Callable[[list[dict[str, str]], int, str], dict[str, float]]:
    """TRL's SFTTrainer; `bf16` None leaves its default."""

    def run(rows: list[dict[str, str]], batch_size: int, method: str) -> dict[str, float]:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        from finespun.models.catalog import converted_folder

        folder = str(converted_folder("smollm2-135m"))
        conversations = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ]
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        options = {} if bf16 is None else {"bf16": bf16}
        with tempfile.TemporaryDirectory() as output:
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32),
                processing_class=AutoTokenizer.from_pretrained(folder),
                train_dataset=Dataset.from_list(conversations),
                args=SFTConfig(
                    output_dir=output,
                    num_train_epochs=1,
                    per_device_train_batch_size=batch_size,
                    learning_rate=LEARNING_RATE,
                    packing=packing,
                    report_to="none",
                    save_strategy="no",
                    logging_steps=1,
                    disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available(),
                    **options,
                ),
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None,
                callbacks=[Clock()],
            )
            tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
            trainer.train()
        return {"tokens": tokens, "seconds": ends[-1] - ends[0]}

    return run


CONTESTANTS = {
    "finespun": finespun,
    "TRL, float32": trl(bf16=False, packing=False),
    "TRL, defaults": trl(bf16=None, packing=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=["finespun", "TRL, float32"])
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.one:
        with arguments.data.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(arguments.rows), strict=False)]
        print(json.dumps(CONTESTANTS[arguments.one](rows, arguments.batch_size, arguments.method)))
        return

    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.contestants}
    for _ in range(arguments.repeat):
        for name in arguments.contestants:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in results.items()}
    print(f"\n{arguments.method}, {arguments.rows} rows of {arguments.data.name}, batch size {arguments.batch_size}\n")
    print("| | tokens | tokens/s, median (all) | finespun is faster by |\n| --- | --- | --- | --- |")
    for name, runs in results.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(speeds["finespun"], speeds[name], strict=True))
        every = ", ".join(f"{speed:.0f}" for speed in speeds[name])
        print(f"| {name} | {runs[0]['tokens']} | {statistics.median(speeds[name]):.0f} ({every}) | {ratio:.2f}× |")


if __name__ == "__main__":
    main()
