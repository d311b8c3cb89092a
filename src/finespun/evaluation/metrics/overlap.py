"""Scores of words shared with the references, the mean over examples: ROUGE, METEOR, exact match and token F1."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Literal

import numpy as np

from finespun.data.quality import units
from finespun.errors import RecipeError
from finespun.evaluation.metrics.base import (
    Better,
    Mean,
    checked,
    common_language,
    needs,
    texts_in_language,
)
from finespun.evaluation.outputs import Output

Several = Literal["best", "mean"]
"""What an example with several references gets: the best of the scores against each, or their mean."""

RougeKind = Literal["1", "2", "L", "Lsum"]


class _AgainstReferences(ABC):
    """A score of an output and one reference; the mean over examples."""

    name: str
    better: Better = "higher"
    needs_references = True
    signature: str
    several: Several = "best"

    def measure(self, outputs: Sequence[Output]) -> Mean:
        score = self._score_of(checked(self, outputs))
        over = max if self.several == "best" else fmean
        return Mean(np.array([over([score(one.text, other) for other in one.references]) for one in outputs]))

    @abstractmethod
    def _score_of(self, outputs: Sequence[Output]) -> Callable[[str, str], float]:
        """What scores an output against a reference."""


class Rouge(_AgainstReferences):
    """ROUGE (Lin 2004) as rouge-score computes it, without stemming: F1, 0 to 1, of words (`kind` "1"), of pairs of
    words ("2"), of the longest common subsequence ("L"), or of those of the lines ("Lsum").

    rouge-score's own tokenizer drops all letters but a to z. It reads English; other languages are read in
    `finespun.data.quality.units`: words with their accents in any alphabet, characters of Chinese and Japanese.
    """

    def __init__(self, kind: RougeKind, language: str | None = None, several: Several = "best") -> None:
        self.name = f"ROUGE-{kind}" + ("-mean" if several == "mean" else "")
        self.several = several
        self.signature = ""
        self._kind = kind
        self._language = language

    def _score_of(self, outputs: Sequence[Output]) -> Callable[[str, str], float]:
        needs("rouge_score", self.name)
        from rouge_score.rouge_scorer import RougeScorer

        texts = list(texts_in_language(outputs))
        language = self._language or common_language(texts)
        english = language == "en" or (language is None and all(map(str.isascii, texts)))
        self.signature = (
            f"refs:{self.several}|f1|stemmer:no|tok:{'rouge-score' if english else 'units'}"
            f"{'|sentences:lines' * (self._kind == 'Lsum')}|rouge-score:{version('rouge-score')}"
        )
        kind = f"rouge{self._kind}"
        scorer = RougeScorer([kind], tokenizer=None if english else _Units())
        return lambda text, reference: scorer.score(reference, text)[kind].fmeasure


class _Units:
    """As rouge-score asks for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return units(text)


class Meteor(_AgainstReferences):
    """METEOR (Banerjee & Lavie 2005) of English as nltk computes it, 0 to 1; best of several references.

    Words are nltk's `NLTKWordTokenizer`'s. Raises `RecipeError` where nltk or the data of WordNet is missing, and for
    another language: synonyms are English.
    """

    name = "METEOR"

    def __init__(self, language: str | None = None) -> None:
        if language not in (None, "en"):
            raise RecipeError(f"METEOR knows the synonyms of English only, and the language is {language}: use chrF++.")
        self.signature = ""

    def _score_of(self, outputs: Sequence[Output]) -> Callable[[str, str], float]:
        needs("nltk", self.name)
        from nltk.corpus import wordnet
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.translate.meteor_score import single_meteor_score

        try:
            wordnet.synsets("word")
        except (LookupError, OSError):  # absent, or not all of it
            raise RecipeError(
                "METEOR needs the data of WordNet, which is not on this machine. With a network: "
                "python -m nltk.downloader wordnet. Without: unpack wordnet.zip from nltk's data into the folder "
                "nltk_data/corpora in your home folder."
            ) from None
        self.signature = f"refs:best|tok:nltk|alpha:0.9|beta:3|gamma:0.5|wordnet|nltk:{version('nltk')}"
        words = NLTKWordTokenizer().tokenize
        return lambda text, reference: single_meteor_score(words(reference), words(text), wordnet=wordnet)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Thai, Lao, Myanmar, Khmer, kana, ideographs.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_tokens(text: str) -> list[str]:
    """The words of a short answer as SQuAD compares them (Rajpurkar et al. 2016): lower-cased, without ASCII
    punctuation and English articles. A text in a script without spaces is read in characters, without punctuation."""
    plain = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))
    return units(plain) if _WITHOUT_SPACES.search(plain) else plain.split()


class ExactMatch(_AgainstReferences):
    """Percent of outputs that are, as `answer_tokens`, the same as a reference."""

    name = "exact-match"
    signature = "refs:best|norm:squad"

    def _score_of(self, outputs: Sequence[Output]) -> Callable[[str, str], float]:
        return lambda text, reference: 100.0 * (answer_tokens(text) == answer_tokens(reference))


class TokenF1(_AgainstReferences):
    """F1 in percent of the `answer_tokens` that an output and a reference share, as SQuAD 2.0 counts: where one has
    none, 100 if the other has none either, else 0."""

    name = "token-F1"
    signature = "refs:best|norm:squad"

    def _score_of(self, outputs: Sequence[Output]) -> Callable[[str, str], float]:
        return _token_f1


def _token_f1(text: str, reference: str) -> float:
    ours, theirs = answer_tokens(text), answer_tokens(reference)
    if not ours or not theirs:
        return 100.0 * (ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 100.0 * 2 * precision * recall / (precision + recall)
