"""Training speed and memory beside the peers: same rows, same model, same number of optimizer steps, one after another.

    python benchmarks/training_throughput.py --data train.jsonl [--model smollm2-135m | gpt2-124m] [--method full | lora]
        [--rows 256] [--batch-size 16] [--repeat 2] [--contestants finespun "TRL, defaults" …]

`--data` is a JSONL file with `prompt` and `completion`, or with `text`, of which rows are drawn at random. Each
contestant runs in a process of its own, in turn, so that a machine that slows down slows all of them down. All see the
rows in the same order, cut at the same length, with the same constant learning rate and no weight decay; only packing
puts rows into other steps.

tokens/s    real tokens (no padding, context included) by the wall time from the beginning of the first step to the end
            of the last
MFU         model FLOPs of a step (those the gradient needs: no products for frozen weights or for tokens without loss,
            causal attention counted once) by its time, as a share of the machine's best matrix product, measured before
            and after: the median step's, and over all steps together. Where the contestant packs, a step's FLOPs are
            the average ones
peak        largest resident set of the process, in MB; on a GPU the most that torch allocated
loss        nats a token on 64 held-out rows, drawn with the training rows, measured by the same code for all

What counts are the ratios; absolute numbers are of one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4
SEED = 0
MAX_LENGTH = 1024
HELD_OUT = 64
COMPILED = "finespun, compiled"
MODELS = ("smollm2-135m", "gpt2-124m", "llama-1b")

Row = dict[str, str]
Result = dict[str, Any]


def build(name: str) -> tuple[Any, Any]:
    """A float32 model and its tokenizer; shapes without weights on this machine get random ones and the same
    tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from finespun.models.load import load_model

    loaded = load_model("smollm2-135m", "float32", torch.device("cpu"))
    torch.manual_seed(0)
    if name == "gpt2-124m":
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval(), loaded.tokenizer
    if name == "llama-1b":
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        config = LlamaConfig(
            **shape, num_key_value_heads=8, vocab_size=49_152, tie_word_embeddings=True, max_position_embeddings=8192
        )
        return LlamaForCausalLM(config).eval(), loaded.tokenizer
    return loaded.model, loaded.tokenizer


def encode(tokenizer: Any, rows: Sequence[Row]) -> list[Any]:
    """The rows as finespun trains them, cut at the length limit."""
    from finespun.data.formats import PromptExample, TextExample
    from finespun.data.readers import Origin
    from finespun.data.templates import Encoder, LengthLimit

    encoder = Encoder(tokenizer, "chat" if "prompt" in rows[0] else "raw")
    limit = LengthLimit(MAX_LENGTH, "cut")
    found = []
    for number, row in enumerate(rows):
        origin = Origin("data", number)
        example = (
            PromptExample(row["prompt"], row["completion"], origin)
            if "prompt" in row
            else TextExample(row["text"], origin)
        )
        found += [limit.fit(whole)[0] for whole in encoder.encode_example(example)]
    return found


def timed(tokens: int, ends: Sequence[float]) -> Result:
    """The speed of a run whose steps lie between `ends`, in seconds."""
    seconds = [end - start for start, end in pairwise(ends)]
    return {"tokens": tokens, "seconds": sum(seconds), "steps": len(seconds), "step_seconds": seconds}


def device() -> Any:
    from finespun.models.load import default_device

    return default_device()


def finespun(
    model: Any, tokenizer: Any, rows: list[Row], batch_size: int, method: str, compiled: bool = False
) -> tuple[Result, Any]:
    """finespun's loop, without validation."""
    from finespun.models.load import LoadedModel, faster_precision
    from finespun.models.trainable import make_trainable
    from finespun.recipe import Recipe
    from finespun.training.loop import ResolvedTraining, train
    from finespun.training.memory import plan_memory, tune_memory_use
    from finespun.training.objectives.causal_lm import CausalLM
    from finespun.training.progress import Reporter
    from finespun.training.schedule import settle

    tune_memory_use()
    loaded = LoadedModel(model.to(device()), tokenizer, "model", Path())
    examples = encode(tokenizer, rows)
    recipe = Recipe.from_keywords(
        method=method,
        epochs=1,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        save_every=10**9,
        precision=faster_precision(loaded.device),
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        seed=SEED,
        compile=compiled,
    )
    make_trainable(loaded, recipe)
    objective = CausalLM(loaded.model)
    plan = plan_memory(objective, examples, recipe.training, max(len(example.input_ids) for example in examples))
    recipe.training.micro_batch_tokens = plan.micro_batch_tokens
    tokens = sum(len(example.input_ids) for example in examples)
    steps = settle(recipe.training, len(examples), tokens, 0, lambda: 0.0)
    started = time.perf_counter()
    ends: list[float] = []
    settings = ResolvedTraining.from_recipe(recipe, steps)
    with tempfile.TemporaryDirectory() as folder:
        train(
            *(loaded.model, objective, examples, [], settings, Path(folder)),
            on_step=lambda metrics: ends.append(time.perf_counter()),
            reporter=Reporter(quiet=True),
        )
    result = timed(tokens, [started, *ends])
    return result | {"planned": plan.total / 1e6, "micro_batch": plan.micro_batch_tokens}, loaded.model


def plain(model: Any, tokenizer: Any, rows: list[Row], batch_size: int, method: str) -> tuple[Result, Any]:
    """The loop that tutorials show: float32, padded to the longest of the batch, loss on every token, AdamW."""
    import torch

    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    sequences = [torch.tensor(example.input_ids, dtype=torch.long) for example in encode(tokenizer, rows)]
    model.to(device()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    ends = [time.perf_counter()]
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(batch, batch_first=True, padding_value=tokenizer.eos_token_id).to(device())
        labels = pad(batch, batch_first=True, padding_value=-100).to(device())
        mask = pad([torch.ones_like(part) for part in batch], batch_first=True).to(device())
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return timed(sum(map(len, sequences)), ends), model


def trl(bf16: bool | None, packing: bool) -> Callable[..., tuple[Result, Any]]:
    """TRL's SFTTrainer; `bf16` None leaves its default. Packed rows are put into as many steps as the others take."""

    def run(model: Any, tokenizer: Any, rows: list[Row], batch_size: int, method: str) -> tuple[Result, Any]:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        conversations = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            if "prompt" in row
            else row
            for row in rows
        ]
        tokens = sum(len(example.input_ids) for example in encode(tokenizer, rows))
        steps = -(-len(rows) // batch_size)
        per_step = max(1, round(tokens / MAX_LENGTH / steps)) if packing else batch_size
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        options: dict[str, Any] = {} if bf16 is None else {"bf16": bf16}
        with tempfile.TemporaryDirectory() as output:
            trainer = SFTTrainer(
                model=model.to(torch.bfloat16) if bf16 else model,
                processing_class=tokenizer,
                train_dataset=Dataset.from_list(conversations),
                args=SFTConfig(
                    output_dir=output,
                    num_train_epochs=1,
                    per_device_train_batch_size=per_step,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    train_sampling_strategy="sequential",
                    max_length=MAX_LENGTH,
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
            real = sum(len(row["input_ids"]) for row in trainer.train_dataset)
            trainer.train()
        return timed(real, ends), trainer.model

    return run


CONTESTANTS = {
    "finespun": finespun,
    COMPILED: partial(finespun, compiled=True),
    "plain PyTorch, float32": plain,
    "TRL, defaults": trl(bf16=None, packing=False),
    "TRL, bfloat16, packed": trl(bf16=True, packing=True),
    "TRL, float32": trl(bf16=False, packing=False),
    "TRL, float32, packed": trl(bf16=False, packing=True),
}


def one(name: str, arguments: argparse.Namespace) -> Result:
    """One contestant, in this process."""
    import torch

    with arguments.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = random.Random(SEED).sample(rows, arguments.rows + HELD_OUT)
    training, held_out = rows[: arguments.rows], rows[arguments.rows :]
    model, tokenizer = build(arguments.model)
    product = product_speed()
    ordered = in_finespuns_order(training, arguments.batch_size)
    given = training if name.startswith("finespun") else ordered
    result, trained = CONTESTANTS[name](model, tokenizer, given, arguments.batch_size, arguments.method)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    product = max(product, product_speed())
    size = len(ordered) if "packed" in name else arguments.batch_size
    parts = [encode(tokenizer, ordered[first : first + size]) for first in range(0, len(ordered), size)]
    flops = [model_flops(trained, part, arguments.method) for part in parts]
    if len(flops) != result["steps"]:
        flops = [sum(flops) / result["steps"]] * result["steps"]
    shares = [needed / seconds / product for needed, seconds in zip(flops, result["step_seconds"], strict=True)]
    of_all = sum(flops) / result["seconds"] / product
    loss = held_out_loss(trained, encode(tokenizer, held_out))
    return result | {"mfu": statistics.median(shares), "mfu_of_all": of_all, "peak": peak, "loss": loss}


def in_finespuns_order(rows: Sequence[Row], batch_size: int) -> list[Row]:
    """The rows of its first epoch, step by step."""
    from itertools import chain, islice

    from finespun.data.packing import step_indices

    steps = islice(step_indices(len(rows), batch_size, SEED), -(-len(rows) // batch_size))
    return [rows[index] for index in chain.from_iterable(steps)]


def product_speed() -> float:
    """FLOP/s of the best matrix product here, of the shapes of a layer, in float32 or bfloat16."""
    import torch

    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1024, 4096) if torch.cuda.is_available() else (1024,):
            left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
            for _ in range(100):
                started = time.perf_counter()
                (left @ right)[0, 0].item()
                best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def model_flops(model: Any, examples: Sequence[Any], method: str) -> float:
    """2 FLOPs for each weight and token forward, 2 for the gradient of the input, 2 for that of a trained weight; the
    head for tokens with loss only; attention 4 × length² / 2 × width forward and twice that backward, a layer."""
    import torch

    base = model.get_base_model() if method == "lora" else model
    head = base.get_output_embeddings()
    matrices = [
        module
        for module in base.base_model.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    frozen = sum(4 * module.weight.numel() for module in matrices if not module.weight.requires_grad)
    trained = sum(6 * module.weight.numel() for module in matrices if module.weight.requires_grad)
    of_head = (6 if head.weight.requires_grad else 4) * head.weight.numel()
    config = base.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    tokens = sum(len(example.input_ids) for example in examples)
    squares = sum(len(example.input_ids) ** 2 for example in examples)
    with_loss = sum(example.trained_tokens for example in examples)
    return (frozen + trained) * tokens + of_head * with_loss + 6 * squares * width * config.num_hidden_layers


def held_out_loss(model: Any, examples: Sequence[Any]) -> float:
    import torch

    from finespun.models.load import compute_in
    from finespun.training.loop import example_losses, weighted_mean
    from finespun.training.objectives.causal_lm import CausalLM

    compute_in(model, torch.float32).eval()
    return weighted_mean(example_losses(CausalLM(model), examples, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=[name for name in CONTESTANTS if name != COMPILED]
    )
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.one:
        print(json.dumps(one(arguments.one, arguments)))
        return

    results: dict[str, list[Result]] = {name: [] for name in arguments.contestants}
    for _ in range(arguments.repeat):
        for name in arguments.contestants:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    report(results, arguments)


def report(results: dict[str, list[Result]], arguments: argparse.Namespace) -> None:
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in results.items()}

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    print(
        f"\n{arguments.model}, {arguments.method}, {arguments.rows} rows of {arguments.data.name}, batch size {arguments.batch_size}\n"
    )
    print("| | steps | tokens/s, median (all) | finespun is faster by | MFU, median step | MFU, all | peak MB | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        pairs = zip(speeds["finespun"], speeds[name], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        every = ", ".join(f"{speed:.1f}" for speed in speeds[name])
        print(
            f"| {name} | {runs[0]['steps']} | {statistics.median(speeds[name]):.1f} ({every}) | {ratio:.2f}× | "
            f"{median(name, 'mfu'):.0%} | {median(name, 'mfu_of_all'):.0%} | {median(name, 'peak'):.0f} | {median(name, 'loss'):.3f} |"
        )
    if "finespun" in results:
        planned, peak = median("finespun", "planned"), median("finespun", "peak")
        print(
            f"\nfinespun planned {planned:.0f} MB ({planned / peak - 1:+.0%}), micro-batches of {median('finespun', 'micro_batch'):.0f} tokens"
        )


if __name__ == "__main__":
    main()
