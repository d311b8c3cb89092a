"""Scores of what a model writes: against references, without them, and a person's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from finespun.errors import DataError, RecipeError
from finespun.evaluation.metrics.base import Measured, Metric
from finespun.evaluation.metrics.diversity import Distinct, Ended, Length, Loops, Repetition, SelfBleu
from finespun.evaluation.metrics.neural import BertScore, Mauve
from finespun.evaluation.metrics.novelty import Novelty
from finespun.evaluation.metrics.overlap import ExactMatch, Meteor, Rouge, TokenF1
from finespun.evaluation.metrics.own import load_metric
from finespun.evaluation.metrics.translation import Bleu, ChrfPlusPlus, Ter, WebnlgBleu
from finespun.recipe import nearest

__all__ = ["METRICS", "Measured", "Metric", "Novelty", "load_metric", "metrics_for"]

METRICS: dict[str, Callable[[str | None], Metric]] = {
    "BLEU": Bleu,
    "chrF++": ChrfPlusPlus,
    "TER": Ter,
    "webnlg-bleu": WebnlgBleu,
    "ROUGE-1": partial(Rouge, "1"),
    "ROUGE-2": partial(Rouge, "2"),
    "ROUGE-L": partial(Rouge, "L"),
    "ROUGE-Lsum": partial(Rouge, "Lsum"),
    "ROUGE-1-mean": partial(Rouge, "1", several="mean"),
    "ROUGE-2-mean": partial(Rouge, "2", several="mean"),
    "ROUGE-L-mean": partial(Rouge, "L", several="mean"),
    "ROUGE-Lsum-mean": partial(Rouge, "Lsum", several="mean"),
    "METEOR": Meteor,
    "exact-match": lambda _: ExactMatch(),
    "token-F1": lambda _: TokenF1(),
    "distinct-1": lambda _: Distinct(1),
    "distinct-2": lambda _: Distinct(2),
    "distinct-3": lambda _: Distinct(3),
    "self-BLEU": lambda _: SelfBleu(),
    "rep-4": lambda _: Repetition(),
    "loops": lambda _: Loops(),
    "length": lambda _: Length(),
    "ended": lambda _: Ended(),
}
"""How each metric is made for the language of the references."""

WITH_A_MODEL: dict[str, Callable[[str], Metric]] = {"BERTScore": BertScore, "MAUVE": Mauve}
"""Those that read texts with a model, named after a colon: `BERTScore:models/roberta-large`."""

_AGAINST_REFERENCES = ["BLEU", "chrF++", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
_ALWAYS = ["distinct-1", "distinct-2", "distinct-3", "rep-4", "loops", "length", "ended"]


def metrics_for(language: str | None, names: Sequence[str] | None, has_references: bool) -> list[Metric]:
    """The metrics called `names`, in their order; without names, those that say something of any text, and with
    references those that are computed fast from them.

    A name is one of `METRICS`, in any case of letters, `BERTScore:MODEL`, `MAUVE:MODEL`, or `module:function`.
    `language` (ISO 639-1, such as `en`, `zh` or `zh-TW`) is told from the references where it is None. Raises
    `RecipeError` for an unknown name or language, and `DataError` for a metric that needs references where there are
    none.
    """
    if language is not None:
        code = re.fullmatch(r"([a-z]{2})([-_].+)?", language.lower())
        if not code:
            raise RecipeError(f"The language {language!r} is no code of ISO 639-1, such as en, de or zh.")
        language = code[1]
    if names is None:
        names = (_AGAINST_REFERENCES if has_references else []) + _ALWAYS
    metrics = [_named(name, language) for name in dict.fromkeys(names)]
    if not has_references and (lacking := [metric.name for metric in metrics if metric.needs_references]):
        raise DataError(
            f"{', '.join(lacking)}: needs references, and the examples have none. Give each a reference, or choose "
            f"metrics without: {', '.join(_ALWAYS)}."
        )
    return metrics


def _named(name: str, language: str | None) -> Metric:
    canonical = {known.lower(): known for known in (*METRICS, *WITH_A_MODEL)}
    before, colon, model = name.partition(":")
    known = canonical.get(before.lower())
    if known in METRICS and not colon:
        return METRICS[known](language)
    if known in WITH_A_MODEL:
        if not model:
            raise RecipeError(f"{known} reads texts with a model of your choice: {known}:FOLDER.")
        return WITH_A_MODEL[known](model)
    if colon:
        return load_metric(name)
    close = nearest(name.lower(), canonical)
    raise RecipeError(
        f"There is no metric {name!r}."
        + (f" Did you mean {canonical[close]}?" if close else f" There are: {', '.join((*METRICS, *WITH_A_MODEL))}.")
        + " One of your own is module:function."
    )
