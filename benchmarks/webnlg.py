"""WebNLG 2017, triples to text: fine-tune SmolLM2-135M, write the test set greedily and with beams, score it as that
literature does.

    python benchmarks/webnlg.py --data DIR [--out runs/webnlg] [--recipe recipes/webnlg.yaml] [--split test | dev]
        [--beams 5]
    python benchmarks/webnlg.py --data DIR --minutes 30 [--out runs/webnlg-30]

DIR has train.jsonl (`prompt`, `completion`), dev.jsonl and test.jsonl (`prompt`, `references`, `category`; `seen` in the
test set). `webnlg-bleu` is BLEU as the challenge counted it: lower case, its tokens, up to three references; the others
are as in sacrebleu. `--minutes` trains finespun and TRL for so long each and scores both on the dev set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tables import add_decoding, named, parser_of, print_table, rows_of, scores, written

from finespun.evaluation.outputs import Output

METRICS = ("webnlg-bleu", "BLEU", "chrF++", "TER")

PUBLISHED = """
Published, webnlg-bleu:

| | unseen | seen | all |
| --- | --- | --- | --- |
| GPT-2 Medium (355M), full | 30.4 | 63.2 | 47.6 |
| GPT-2 Medium, prefix | 44.1 | 63.1 | 54.4 |
| GPT-2 Medium, LoRA | 46.7 | 62.1 | 55.3 |
| GPT-2 Large (774M), LoRA | 48.4 | 64.0 | 57.0 |"""


def parts(outputs: Sequence[Output], test: Path) -> dict[str, list[Output]]:
    """Outputs by whether their category was trained, where the file says so, and all of them."""
    seen = [row.get("seen") for row in rows_of(outputs, test)]
    found = {
        name: [output for output, known in zip(outputs, seen, strict=True) if known is wanted]
        for name, wanted in (("unseen", False), ("seen", True))
    }
    return {name: part for name, part in found.items() if part} | {"all": list(outputs)}


def main() -> None:
    parser = parser_of(__doc__, "webnlg")
    add_decoding(parser)
    arguments = parser.parse_args()
    metrics = named(METRICS, "en")
    for decoding, test, answers in written(arguments, "jsonl", metrics):
        print(f"\n{test}, {decoding}, {len(answers.outputs)} prompts, {answers.minutes:.0f} minutes")
        print_table({name: scores(part, metrics) for name, part in parts(answers.outputs, test).items()})
    if arguments.split == "test" and not arguments.minutes:
        print(PUBLISHED)


if __name__ == "__main__":
    main()
