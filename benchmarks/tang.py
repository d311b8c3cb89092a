"""Tang poems, a Chinese run from end to end: fine-tune SmolLM2-135M on poems and their titles, measure bits per byte of
held-out ones before and after, write poems for their titles, and count those whose lines are of equal length.

    python benchmarks/tang.py --data DIR [--out runs/tang] [--recipe recipes/tang.yaml]

DIR has poems.jsonl (`title`, `author`, `text`); every twentieth poem is held out. Of the held-out poems themselves the
shares are printed beside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from tables import minutes_of_training, parser_of, print_table, train, with_interval

from finespun.evaluation.comparison import interval
from finespun.evaluation.evaluate import evaluate
from finespun.evaluation.metrics.base import Mean
from finespun.evaluation.outputs import Output, read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.files import write_jsonl
from finespun.generation.settings import Sampling

HELD_OUT = 20


def line_length(poem: str) -> int | None:
    """Characters of each line of a poem, where all of at least two have the same number."""
    lengths = {len(line) for line in re.split(r"[，。！？；、：\s]+", poem.strip()) if line}
    return lengths.pop() if len(lengths) == 1 and len(re.findall(r"[，。！？；]", poem)) > 1 else None


def share(texts: Sequence[str], lengths: tuple[int, ...]) -> str:
    """Of `texts`, those with lines of equal length, one of `lengths`, %, with its interval."""
    told = interval(Mean(np.array([100.0 * (line_length(text) in lengths) for text in texts])), examples=len(texts))
    return f"{told.value:.0f} % [{told.low:.0f}, {told.high:.0f}]"


def main() -> None:
    arguments = parser_of(__doc__, "tang").parse_args()
    poems = [json.loads(line) for line in (arguments.data / "poems.jsonl").open(encoding="utf-8")]
    folder = arguments.out.with_name(f"{arguments.out.name}-data")
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = folder / "train.jsonl", folder / "test.jsonl"
    write_jsonl(training, [poem for number, poem in enumerate(poems) if number % HELD_OUT])
    write_jsonl(held_out, poems[::HELD_OUT])
    run = train(arguments.recipe, arguments.out, "--data.source", str(training))
    print(f"{run}: {minutes_of_training(run):.0f} minutes of training")
    data, settings = EvaluationData(source=[str(held_out)]), EvaluationSettings(metrics=["ended", "loops"])
    tuned = evaluate(run, data, settings, Sampling(max_new_tokens=300, temperature=1.0, top_p=0.9), base=True)
    columns = {}
    for name, where in (("base", tuned / "base"), ("tuned", tuned)):
        measured = json.loads((where / "summary.json").read_text(encoding="utf-8"))["metrics"]
        outputs = read_outputs(where / "outputs.jsonl")
        columns[name] = {
            each["name"]: with_interval(each["value"], each["low"], each["high"]) for each in measured
        } | shares([output.text for output in outputs])
    of_people = shares([reference for output in outputs for reference in output.references])
    columns["people"] = dict.fromkeys(columns["tuned"], "") | of_people
    print_table(columns)
    print(examples(outputs[:3]))


def shares(texts: Sequence[str]) -> dict[str, str]:
    return {"lines of five": share(texts, (5,)), "lines of seven": share(texts, (7,)), "either": share(texts, (5, 7))}


def examples(outputs: Sequence[Output]) -> str:
    return "\n".join(f"\n{output.prompt}\n{output.text}" for output in outputs)


if __name__ == "__main__":
    main()
