"""WebNLG 2017, triples to text: fine-tune SmolLM2-135M, write the test set greedily and with beams, score it as that
literature does.

    python benchmarks/webnlg.py --data DIR [--out runs/webnlg] [--recipe recipes/webnlg.yaml] [--split test | dev]
        [--beams 5] [--limit N]
    python benchmarks/webnlg.py --data DIR --minutes 30 [--out runs/webnlg-30]

DIR has train.jsonl (`prompt`, `completion`), dev.jsonl and test.jsonl (`prompt`, `references`, `category`; `seen` in the
test set). `webnlg-bleu` is BLEU as the challenge counted it: lower case, its tokens, up to three references; the others
are as in sacrebleu. `--minutes` trains finespun and TRL for so long each and scores both on the dev set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tables import rows_of, scores, train, train_with_trl, write

from finespun.evaluation.outputs import Output
from finespun.generation.settings import Sampling
from finespun.recipe import Recipe

METRICS = ("webnlg-bleu", "BLEU", "chrF++", "TER")

PUBLISHED = """
| GPT-2 Medium (355M), full | 30.4 | 63.2 | 47.6 |
| GPT-2 Medium, prefix | 44.1 | 63.1 | 54.4 |
| GPT-2 Medium, LoRA | 46.7 | 62.1 | 55.3 |
| GPT-2 Large (774M), LoRA | 48.4 | 64.0 | 57.0 |
"""


def parts(outputs: Sequence[Output], test: Path) -> dict[str, list[Output]]:
    """Outputs by whether their category was trained; all of them where the file does not say."""
    seen = [row.get("seen") for row in rows_of(outputs, test)]
    found = {
        name: [output for output, known in zip(outputs, seen, strict=True) if known is wanted]
        for name, wanted in (("unseen", False), ("seen", True))
    }
    return {name: part for name, part in found.items() if part} | {"all": list(outputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/webnlg"))
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "webnlg.yaml")
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--minutes", type=float)
    arguments = parser.parse_args()
    training = arguments.data / "train.jsonl"
    if arguments.minutes:
        beside_trl(arguments, training)
        return
    run = train(arguments.recipe, training, arguments.out)
    test = arguments.data / f"{arguments.split}.jsonl"
    for decoding, sampling in {
        "greedy": Sampling(max_new_tokens=160),
        f"{arguments.beams} beams": Sampling(max_new_tokens=160, beams=arguments.beams),
    }.items():
        outputs = write(run, test, f"{arguments.split}-{decoding.replace(' ', '-')}", sampling)
        measured = {name: scores(part, METRICS, "en") for name, part in parts(outputs, test).items()}
        print(f"\n{run.name}, {arguments.split}, {decoding}, {len(outputs)} prompts\n")
        print("| | " + " | ".join(measured) + " |\n| --- |" + " --- |" * len(measured))
        for metric in METRICS:
            print(f"| {metric} | " + " | ".join(found[metric] for found in measured.values()) + " |")
    if arguments.split == "test":
        print("\nPublished, webnlg-bleu:\n\n| | unseen | seen | all |\n| --- | --- | --- | --- |" + PUBLISHED.rstrip())


def beside_trl(arguments: argparse.Namespace, training: Path) -> None:
    recipe = Recipe.load(arguments.recipe, {})
    template = recipe.data.template.model_dump(exclude_none=True) if recipe.data.template else {}
    dev = arguments.data / "dev.jsonl"
    options = ("--training.max-minutes", str(arguments.minutes))
    ours = train(arguments.recipe, training, arguments.out / "finespun", *options)
    theirs = train_with_trl(training, arguments.out / "trl", arguments.minutes, template, 2e-4, 4)
    print("| | " + " | ".join(METRICS) + " |\n| --- |" + " --- |" * len(METRICS))
    for name, model, like in (("finespun", ours, None), ("TRL, bfloat16, packed", theirs, ours)):
        found = scores(write(model, dev, "dev", Sampling(max_new_tokens=160), like), METRICS, "en")
        print(f"| {name} | " + " | ".join(found[metric] for metric in METRICS) + " |")


if __name__ == "__main__":
    main()
