"""Multi30k, English captions into German: fine-tune SmolLM2-135M, write test 2016 greedily and with beams, score it.

    python benchmarks/multi30k.py --data DIR [--out runs/multi30k] [--recipe recipes/multi30k.yaml] [--split test | dev]
        [--beams 5]
    python benchmarks/multi30k.py --data DIR --minutes 30 [--out runs/multi30k-30]

DIR has train.en-de.jsonl (`prompt`, `completion`), dev.en-de.jsonl and test.en-de.jsonl (`prompt`, `references`).
`--minutes` trains finespun and TRL for so long each and scores both on the dev set.
"""

from __future__ import annotations

from tables import add_decoding, named, parser_of, print_table, scores, written

METRICS = ("BLEU", "chrF++")


def main() -> None:
    parser = parser_of(__doc__, "multi30k")
    add_decoding(parser)
    metrics, columns = named(METRICS, "de"), {}
    for decoding, _, answers in written(parser.parse_args(), "en-de.jsonl", metrics):
        columns[f"{decoding}, {answers.minutes:.0f} min"] = scores(answers.outputs, metrics)
    if columns:
        print_table(columns)


if __name__ == "__main__":
    main()
