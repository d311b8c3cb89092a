"""DialogSum with few examples: fine-tune SmolLM2-135M on 500 dialogues and their summaries, write the test set with it
and with the model as it was, score both against three references, and prepare a page for people to judge them.

    python benchmarks/dialogsum.py --data DIR [--out runs/dialogsum] [--recipe recipes/dialogsum.yaml] [--judged 60]

DIR has train_small.jsonl (`document`, `summary`) and test.jsonl (`document`, `references`). ROUGE is the best of the
three references, or their mean. "copied" is the share of a summary's 4-grams that stand in its own dialogue. Behind it,
`finespun judge OUT/judgements.sqlite` opens the page, on which nobody has judged yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tables import minutes_of_training, named, parser_of, print_table, scores, train

from finespun.data.quality import units
from finespun.evaluation.comparison import interval
from finespun.evaluation.evaluate import evaluate
from finespun.evaluation.judging.settings import StudySettings
from finespun.evaluation.judging.store import open_study
from finespun.evaluation.metrics.base import Mean
from finespun.evaluation.outputs import Output, read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling

METRICS = (*(f"ROUGE-{kind}{several}" for several in ("", "-mean") for kind in "12L"), "rep-4", "length", "ended")
NGRAM = 4


def grams(text: str) -> list[tuple[str, ...]]:
    words = units(text)
    return list(zip(*(words[first:] for first in range(NGRAM)), strict=False))


def copied(outputs: Sequence[Output]) -> str:
    """Mean over outputs of the share of their 4-grams that stand in the prompt, %, with its interval."""
    shares = []
    for output in outputs:
        turns = output.prompt if isinstance(output.prompt, list) else [{"content": output.prompt}]
        written, read = grams(output.text), {*grams("\n".join(turn["content"] for turn in turns))}
        if written:
            shares.append(100 * sum(gram in read for gram in written) / len(written))
    told = interval(Mean(np.array(shares)), examples=len(shares))
    return f"{told.value:.1f} % [{told.low:.1f}, {told.high:.1f}]"


def main() -> None:
    parser = parser_of(__doc__, "dialogsum")
    parser.add_argument("--judged", type=int, default=60)
    arguments = parser.parse_args()
    run = train(arguments.recipe, arguments.out, "--data.source", str(arguments.data / "train_small.jsonl"))
    print(f"{run}: {minutes_of_training(run):.0f} minutes of training")
    data = EvaluationData(source=[str(arguments.data / "test.jsonl")])
    sampling = Sampling(max_new_tokens=128)
    tuned = evaluate(run, data, EvaluationSettings(metrics=["length"]), sampling, base=True, name="test")
    columns = {}
    for name, folder in (("base", tuned / "base"), ("tuned", tuned)):
        outputs = read_outputs(folder / "outputs.jsonl")
        columns[name] = scores(outputs, named(METRICS, "en")) | {"copied": copied(outputs)}
    print_table(columns)
    study = run / "judgements.sqlite"
    if not study.exists():
        settings = StudySettings(examples=arguments.judged)
        open_study([f"base={tuned / 'base'}", f"tuned={tuned}"], study, settings).close()
    print(f"\nTo be judged by people: finespun judge {study}")


if __name__ == "__main__":
    main()
