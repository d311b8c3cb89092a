"""Multi30k, English captions into German: fine-tune SmolLM2-135M, write test 2016 greedily and with beams, score it.

    python benchmarks/multi30k.py --data DIR [--out runs/multi30k] [--recipe recipes/multi30k.yaml] [--split test | dev]
        [--beams 5]
    python benchmarks/multi30k.py --data DIR --minutes 30 [--out runs/multi30k-30]

DIR has train.en-de.jsonl (`prompt`, `completion`), dev.en-de.jsonl and test.en-de.jsonl (`prompt`, `references`).
`--minutes` trains finespun and TRL for so long each and scores both on the dev set.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tables import add_decoding, named, parser_of, print_table, rows_of, scores, written

from finespun.evaluation.metrics.base import tokens
from finespun.evaluation.outputs import Output

METRICS = ("BLEU", "chrF++")
KIND = "en-de.jsonl"


def words(text: str) -> set[str]:
    return {token for token in tokens(text) if token.isalpha()}


def by_rarest_word(outputs: Sequence[Output], test: Path, training: Path) -> dict[str, list[Output]]:
    """Outputs by how many captions of `training` have the rarest English word of theirs, and all of them."""
    with training.open(encoding="utf-8") as file:
        captions = Counter(word for line in file for word in words(json.loads(line)["prompt"]))
    found: list[list[Output]] = [[], [], [], []]
    for output, row in zip(outputs, rows_of(outputs, test), strict=True):
        found[bisect((1, 10, 100), min(captions[word] for word in words(row["prompt"])))].append(output)
    names = ("in none", "in 1 to 9", "in 10 to 99", "in 100 or more")
    parts = {f"{name} ({len(part)})": part for name, part in zip(names, found, strict=True) if part}
    return parts | {"all": list(outputs)}


def main() -> None:
    parser = parser_of(__doc__, "multi30k")
    add_decoding(parser)
    arguments = parser.parse_args()
    metrics = named(METRICS, "de")
    for decoding, test, answers in written(arguments, KIND, metrics):
        print(f"\n{test}, {decoding}, {answers.minutes:.0f} minutes; the rarest word of the caption is")
        columns = by_rarest_word(answers.outputs, test, arguments.data / f"train.{KIND}")
        print_table({name: scores(part, metrics) for name, part in columns.items()})


if __name__ == "__main__":
    main()
