"""Preparing data beside TRL's SFTTrainer: the same rows, tokenizer and length limit, one after the other.

    python benchmarks/data_preparation.py --data train.jsonl [more.jsonl ...] [--generate-mb 1024] [--repeat 2]

`--data` are JSONL files with `prompt` and `completion`; `--generate-mb` makes one of this size, the same one each time.
Each contestant runs in a process of its own, in turn, so that a machine that slows down slows all of them down.

Time is wall time from opening the file to the first batch: reading, chat template, tokenizing, packing. Imports and the
loading of model and tokenizer are not in it, nor is what is done once in a process, since each contestant prepares a
few rows first. In it is what a user has to do, such as making messages of the columns, and for TRL the trainer's
constructor, in which it prepares its data; its model has random weights and next to no size. TRL gets an empty cache,
finespun another; a "second start" finds the cache that the same contestant has just filled. The caches lie in the
system's temporary folder (`TMPDIR`), where TRL needs some 14 times the room of the data.

Memory is the largest of the process and its children; of several processes not the sum. In `peak` is what it took to
begin with, in `grown` not. Pages of files that are mapped into memory count in both: most of what TRL's data sets take,
which the system can take back. `own` leaves them out, and is the sum of all processes, beyond what was there before;
it is looked at twice a second (Linux only).

CPU time is that of all threads and of the children; where others use the machine, its ratio says more than that of the
wall time.

TRL keeps the line end that the chat template puts behind an answer, so it has one token more in each row. What counts
are the ratios; absolute numbers are of this machine on this day.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

MODEL = "smollm2-135m"
MAX_LENGTH = 2048
BATCH_SIZE = 8
ROWS_BEFORE = 16
"""Rows that are prepared before the time is taken."""

OWN_EVERY = 0.5
"""Seconds after which the memory of a contestant is looked at again."""

SECOND_START = ", second start"

Result = dict[str, float]
Count = Callable[[], tuple[int, int]]
"""Examples and tokens, counted when the time has been taken."""
Prepare = Callable[[Path, Path], Count]
"""Prepares a file with a cache folder, to the first batch."""


def model_folder() -> Path:
    """The model's folder, which is converted first where it has not been yet."""
    from finespun.models.load import locate_model

    return locate_model(MODEL).path


def finespun() -> Prepare:
    """finespun's data layer, wired as a run wires it, without validation."""
    from transformers import AutoTokenizer

    from finespun.data.packing import micro_batches, pack, step_indices
    from finespun.data.prepare import encode_texts, encoder_for
    from finespun.data.texts import read_texts
    from finespun.recipe import DataRecipe

    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def prepare(file: Path, cache: Path) -> Count:
        os.environ["FINESPUN_CACHE"] = str(cache)
        recipe = DataRecipe(source=[str(file)], validation=0.0, max_length=MAX_LENGTH, too_long="cut")
        texts = read_texts(recipe)
        train = encode_texts(texts, encoder_for(texts, tokenizer, recipe), recipe, MAX_LENGTH).train
        batch = [train[index] for index in next(step_indices(len(train), BATCH_SIZE, seed=0))]
        pack(micro_batches(batch, MAX_LENGTH)[0])
        return lambda: (len(train), int(train.lengths.sum()))

    return prepare


def trl(packing: bool, processes: int | None = None) -> Prepare:
    """TRL's SFTTrainer; `processes` None leaves its default."""
    import pyarrow.compute as pc
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=MAX_LENGTH,
        )
    )

    def conversations(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        return {
            "prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]],
            "completion": [[{"role": "assistant", "content": text}] for text in rows["completion"]],
        }

    def prepare(file: Path, cache: Path) -> Count:
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows.map(conversations, batched=True, num_proc=processes),
            args=SFTConfig(
                output_dir=str(cache / "output"),
                max_length=MAX_LENGTH,
                packing=packing,
                dataset_num_proc=processes,
                per_device_train_batch_size=BATCH_SIZE,
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
        )
        next(iter(trainer.get_train_dataloader()))

        def count() -> tuple[int, int]:
            examples = tokens = 0
            for batch in trainer.train_dataset.with_format("arrow").iter(batch_size=1000):
                examples += pc.sum(pc.list_value_length(batch["seq_lengths"])).as_py() if packing else len(batch)
                tokens += pc.sum(pc.list_value_length(batch["input_ids"])).as_py()
            return examples, tokens

        return count

    return prepare


CONTESTANTS: dict[str, Callable[[], Prepare]] = {
    "finespun": finespun,
    f"finespun{SECOND_START}": finespun,
    "TRL, packing": partial(trl, packing=True),
    f"TRL, packing{SECOND_START}": partial(trl, packing=True),
    "TRL, packing, 2 processes": partial(trl, packing=True, processes=2),
    "TRL": partial(trl, packing=False),
    "TRL, 2 processes": partial(trl, packing=False, processes=2),
}


def measured(prepare: Prepare, file: Path, cache: Path) -> Result:
    """Time, memory (MB) and what came out of preparing `file`."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder, "few.jsonl")
        with file.open(encoding="utf-8") as lines:
            few.write_text("".join(islice(lines, ROWS_BEFORE)), encoding="utf-8")
        prepare(few, Path(folder, "cache"))
    before = resident_memory()
    own, began, worked = own_memory(os.getpid()), time.monotonic(), sum(os.times()[:4])
    count = prepare(file, cache)
    ended, cpu = time.monotonic(), sum(os.times()[:4]) - worked
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak *= (1 if sys.platform == "darwin" else 1024) / 1e6
    examples, tokens = count()
    return {
        "seconds": ended - began,
        "cpu": cpu,
        "examples": examples,
        "tokens": tokens,
        "peak": peak,
        "grown": max(0.0, peak - before),
        "own": own,  # `run` takes it from what it has seen
        "began": began,
        "ended": ended,
    }


def resident_memory() -> float:
    """MB of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6 if statm.exists() else 0.0


def own_memory(process: int) -> float:
    """MB in memory that belong to a process and its children and to no file, what they share counted once; 0 where the
    system does not say."""
    found = 0.0
    with suppress(OSError):  # it has just ended
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        found = int(rollup.partition("Pss_Anon:")[2].split(maxsplit=1)[0]) * 1024 / 1e6
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += sum(own_memory(int(child)) for child in children.read_text().split())
    return found


def generate(path: Path, megabytes: int) -> None:
    """Writes rows of 200 to 4,000 characters: sentences of words that are as frequent as Zipf's law has it, those of
    the fables that come with finespun first, and behind them rarer ones put together from these."""
    random = np.random.default_rng(0)
    words = np.array(_words(50_000, random), dtype=object)
    shares = 1 / (np.arange(len(words)) + 2.7)
    lengths = random.integers(4, 25, 1 << 16)
    drawn = words[np.searchsorted(np.cumsum(shares / shares.sum())[:-1], random.random(lengths.sum()))].tolist()
    ends = np.cumsum(lengths).tolist()
    sentences = []
    for start, end in zip([0, *ends], ends, strict=False):
        sentence = " ".join(drawn[start:end])
        sentences.append(f"{sentence[0].upper()}{sentence[1:]}{'.?!'[end % 7 % 3]}")
    usual = statistics.mean(map(len, sentences))
    left = megabytes * 1_000_000
    with path.open("wb") as file:
        while left > 0:
            sizes = np.exp(random.uniform(np.log(200), np.log(4000), 1000)).astype(int)
            counts = (1.2 * sizes / usual).astype(int) + 4
            chosen = iter(random.integers(0, len(sentences), counts.sum()).tolist())
            for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
                text = " ".join([sentences[at] for at in islice(chosen, count)])
                middle = text.index(" ", size // 4)
                row = {"prompt": text[:middle], "completion": text[middle + 1 : size].rstrip()}
                left -= file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                if left <= 0:
                    break


def _words(count: int, random: np.random.Generator) -> list[str]:
    """Different words, the most frequent first."""
    from finespun.data.sources import builtin_sets

    rows = map(json.loads, builtin_sets()["fables"].train.read_text(encoding="utf-8").splitlines())
    words = [
        word for word, _ in Counter(word for row in rows for word in re.findall(r"[\w'’]+", row["fable"])).most_common()
    ]
    parts = [word for word in words if word.isalpha() and word.islower() and len(word) > 2]
    found = dict.fromkeys(words)
    while len(found) < count:
        first, second = (parts[at] for at in random.integers(0, len(parts), 2))
        found[(first + second).replace("e", "é" if len(found) % 20 == 0 else "e")] = None
    return list(found)


def run(name: str, file: Path, cache: Path) -> Result:
    """One contestant in a process of its own."""
    if hasattr(os, "sync"):
        os.sync()  # what the one before has written is not this one's to wait for
    command = [sys.executable, __file__, "--one", name, "--data", str(file), "--cache", str(cache)]
    seen: list[tuple[float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=OWN_EVERY)
                break
            except subprocess.TimeoutExpired:
                seen.append((time.monotonic(), own_memory(process.pid)))
    if process.returncode:
        raise SystemExit(f"{name} failed with {file}.")
    result = json.loads(output.splitlines()[-1])
    began, ended = result.pop("began"), result.pop("ended")
    own = [memory for moment, memory in seen if began < moment < ended]
    return result | {"own": max(0.0, max(own, default=0.0) - result["own"])}


def compare(file: Path, names: list[str], repeat: int) -> dict[str, list[Result]]:
    """The results of all contestants, whose tokens must be the same but for a line end in each row."""
    results: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder, "cache")
            for name in names:
                if not name.endswith(SECOND_START):
                    shutil.rmtree(cache, ignore_errors=True)
                results[name].append(run(name, file, cache))
                print(file, name, results[name][-1], file=sys.stderr)
    ours = results["finespun"][0]
    for name, (theirs, *_) in results.items():
        more = theirs["tokens"] - ours["tokens"]
        if not 0 <= more <= ours["examples"] or theirs["examples"] != ours["examples"]:
            raise SystemExit(f"{file}: {name} made {theirs}, finespun {ours}: not the same work.")
    return results


def median_of(results: list[Result], what: str) -> float:
    """The median."""
    return statistics.median(result[what] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--generate-mb", type=int)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(CONTESTANTS[arguments.one](), arguments.data[0], arguments.cache)))
        return

    wanted = {"finespun", *arguments.contestants}
    if any(name.endswith(SECOND_START) for name in wanted):
        wanted.add("finespun" + SECOND_START)
    names = [name for name in CONTESTANTS if name in wanted or name + SECOND_START in wanted]
    with tempfile.TemporaryDirectory() as folder:
        files = list(arguments.data)
        if arguments.generate_mb:
            files.append(Path(folder, "generated", f"{arguments.generate_mb}-mb.jsonl"))
            files[-1].parent.mkdir()
            generate(files[-1], arguments.generate_mb)
        if not files:
            parser.error("give --data, --generate-mb or both")
        sizes = {file: file.stat().st_size / 1e6 for file in files}
        compared = {file: compare(file, names, arguments.repeat) for file in files}
    report(compared, sizes)


def report(compared: dict[Path, dict[str, list[Result]]], sizes: dict[Path, float]) -> None:
    """Two tables: all contestants, and finespun beside the fastest of TRL's from an empty cache."""
    print(
        "\n| file | | rows | tokens | seconds, median (all) | MB/s | CPU s | peak MB | grown MB | own MB | finespun is faster by |"
    )
    print("|" + " --- |" * 11)
    headlines = []
    for file, results in compared.items():
        label = "/".join(file.parts[-2:])
        ours = results["finespun"]
        for name, runs in results.items():
            seconds = median_of(runs, "seconds")
            every = ", ".join(f"{run['seconds']:.2f}" for run in runs)
            memory = " | ".join(f"{median_of(runs, what):.0f}" for what in ("peak", "grown", "own"))
            like = results["finespun" + SECOND_START * name.endswith(SECOND_START)]
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(like, runs, strict=True))
            print(
                f"| {label} | {name} | {runs[0]['examples']} | {runs[0]['tokens']} | {seconds:.2f} ({every}) "
                f"| {sizes[file] / seconds:.2f} | {median_of(runs, 'cpu'):.2f} | {memory} | {ratio:.2f}× |"
            )
        theirs = [name for name in results if name.startswith("TRL") and not name.endswith(SECOND_START)]
        if theirs:
            best = min(theirs, key=lambda name: median_of(results[name], "seconds"))
            headlines.append((file, label, best, ours, results[best]))
    if not headlines:
        return
    print("\nfinespun : TRL's fastest\n")
    print(
        "| file | rows | tokens | seconds | MB/s | peak MB | faster by | less CPU by | of TRL's memory: peak, grown, own |"
    )
    print("|" + " --- |" * 9)
    for file, label, name, ours, theirs in headlines:
        mine, other = ({what: median_of(runs, what) for what in runs[0]} for runs in (ours, theirs))
        rates = " : ".join(f"{sizes[file] / side['seconds']:.2f}" for side in (mine, other))
        peaks = " : ".join(f"{side['peak']:.0f}" for side in (mine, other))
        memory = ", ".join(
            f"{mine[what] / other[what]:.2f}" if other[what] else "–" for what in ("peak", "grown", "own")
        )
        print(
            f"| {label} | {mine['examples']:.0f} | {mine['tokens']:.0f} | {mine['seconds']:.2f} : {other['seconds']:.2f} "
            f"({name}) | {rates} | {peaks} | {other['seconds'] / mine['seconds']:.2f}× | {other['cpu'] / mine['cpu']:.2f}× "
            f"| {memory} |"
        )


if __name__ == "__main__":
    main()
