"""Multi30k, English captions into German: fine-tune SmolLM2-135M, write test 2016 greedily and with beams, score it.

    python benchmarks/multi30k.py --data DIR [--out runs/multi30k] [--recipe recipes/multi30k.yaml] [--split test | dev]
        [--beams 5]
    python benchmarks/multi30k.py --data DIR --minutes 30 [--out runs/multi30k-30]

DIR has train.en-de.jsonl (`prompt`, `completion`), dev.en-de.jsonl and test.en-de.jsonl (`prompt`, `references`).
`--minutes` trains finespun and TRL for so long each and scores both on the dev set.
"""

from __future__ import annotations

from tables import add_decoding, beside_trl, minutes_of_training, named, parser_of, print_table, scores, train, write

from finespun.generation.settings import Sampling

METRICS = ("BLEU", "chrF++")


def main() -> None:
    parser = parser_of(__doc__, "multi30k")
    add_decoding(parser)
    arguments = parser.parse_args()
    training, metrics = arguments.data / "train.en-de.jsonl", named(METRICS, "de")
    if arguments.minutes:
        dev = arguments.data / "dev.en-de.jsonl"
        beside_trl(arguments.recipe, training, dev, arguments.out, arguments.minutes, metrics)
        return
    run = train(arguments.recipe, arguments.out, "--data.source", str(training))
    print(f"{run}: {minutes_of_training(run):.0f} minutes of training")
    test = arguments.data / f"{arguments.split}.en-de.jsonl"
    columns = {}
    for decoding, beams in (("greedy", 1), (f"{arguments.beams} beams", arguments.beams)):
        sampling = Sampling(max_new_tokens=160, beams=beams)
        written = write(run, test, f"{arguments.split}-{decoding.replace(' ', '-')}", sampling)
        columns[f"{decoding}, {written.minutes:.0f} min"] = scores(written.outputs, metrics)
    print_table(columns)


if __name__ == "__main__":
    main()
