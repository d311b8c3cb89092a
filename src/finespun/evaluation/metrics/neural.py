"""Scores that a model computes from what it reads in the texts: BERTScore and MAUVE. Each is an extra, with a model
that the person chooses."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finespun.errors import ModelNotFound, RecipeError
from finespun.evaluation.metrics.base import Better, Mean, checked, needs
from finespun.evaluation.outputs import Output

READ = 512
"""Tokens of a text that are read, if the model can read so many."""


class BertScore:
    """BERTScore (Zhang et al. 2020) as bert-score computes it: F1 of matched token embeddings, without idf weights and
    baseline; best of several references. 0 for an empty output.

    `model` is the folder or hub name of an encoder, after an @ the layer that is read: `roberta-large@17`. Without one
    it is the layer that bert-score recommends for the model of that name. Raises `RecipeError` where there is none.
    """

    name = "BERTScore"
    better: Better = "higher"
    needs_references = True
    signature = ""

    def __init__(self, model: str) -> None:
        self._model, _, self._layer = model.partition("@")
        if self._layer and not self._layer.isdigit():
            raise RecipeError(f"BERTScore:{model}: the layer after the @ should be a number, as in roberta-large@17.")

    def measure(self, outputs: Sequence[Output]) -> Mean:
        checked(self, outputs)
        needs("bert_score", self.name, "bertscore")
        layer = self._layers()
        with _found(self.name, self._model):
            scorer: Any = import_module("bert_score").BERTScorer(model_type=self._model, num_layers=layer)
        # bert-score cuts texts to what the tokenizer says, which may be no limit at all.
        scorer._tokenizer.model_max_length = _readable(scorer._model.config)
        self.signature = f"refs:best|f1|model:{self._model}|layer:{layer}|idf:no|bert-score:{version('bert-score')}"
        scores = np.zeros(len(outputs))
        # It does not read empty texts with the tokenizers of transformers 5.
        pairs = [
            (place, output.text, references)
            for place, output in enumerate(outputs)
            if output.text.strip() and (references := [other for other in output.references if other.strip()])
        ]
        if pairs:
            places, texts, references = zip(*pairs, strict=True)
            _, _, f1 = scorer.score(list(texts), list(references))
            scores[list(places)] = f1.double().numpy()
        return Mean(scores)

    def _layers(self) -> int:
        if self._layer:
            return int(self._layer)
        model2layers = import_module("bert_score.utils").model2layers
        for name in (self._model, self._model.rstrip("/").rsplit("/", 1)[-1]):
            if name in model2layers:
                return model2layers[name]
        raise RecipeError(
            f"BERTScore: bert-score recommends no layer for {self._model}. Say which to read: "
            f"BERTScore:{self._model}@LAYER."
        )


class Mauve:
    """MAUVE (Pillutla et al. 2021) of outputs and references as mauve-text computes it, 0 to 1, from the last hidden
    state that `model` (a folder or hub name; GPT-2 large in the paper) has of each text. The first reference of each
    example is taken, and empty texts are left out.

    It compares two collections, of some thousand texts each; of few it says little. Each `value` of a draw takes a
    clustering, seconds for thousands of texts.
    """

    name = "MAUVE"
    better: Better = "higher"
    needs_references = True
    signature = ""

    def __init__(self, model: str) -> None:
        self._model = model

    def measure(self, outputs: Sequence[Output]) -> MeasuredMauve:
        checked(self, outputs)
        needs("mauve", self.name, "mauve")
        self.signature = f"refs:first|model:{self._model}|buckets:n/10|scale:5|mauve-text:{version('mauve-text')}"
        texts = [output.text for output in outputs] + [output.references[0] for output in outputs]
        features = self._features(texts)
        return MeasuredMauve(features[: len(outputs)], features[len(outputs) :])

    def _features(self, texts: list[str]) -> NDArray[np.float32]:
        """`[texts, width]`; NaN for an empty text."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        with _found(self.name, self._model):
            tokenizer: Any = AutoTokenizer.from_pretrained(self._model)
            model = AutoModel.from_pretrained(self._model).eval()
        features = np.full((len(texts), model.config.hidden_size), np.nan, np.float32)
        limit = _readable(model.config)
        with torch.inference_mode():
            for place, text in enumerate(texts):
                ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").input_ids
                if text and ids.shape[1]:
                    features[place] = model(ids).last_hidden_state[0, -1].float().numpy()
        return features


@dataclass(frozen=True)
class MeasuredMauve:
    """`written` and `human` are `[n, width]` features, NaN for empty texts."""

    written: NDArray[np.float32]
    human: NDArray[np.float32]
    per_example: None = None
    slow: bool = True
    """Each value takes a clustering."""

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        written, human = (
            features[~np.isnan(features[:, 0])]
            for features in ((self.written, self.human) if draw is None else (self.written[draw], self.human[draw]))
        )
        if not len(written) or not len(human):
            return 0.0
        return float(import_module("mauve").compute_mauve(p_features=human, q_features=written).mauve)


def _readable(config: Any) -> int:
    # RoBERTa keeps two positions for itself.
    return min(READ, getattr(config, "max_position_embeddings", READ + 2) - 2)


@contextmanager
def _found(metric: str, model: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelNotFound(
            f"{metric}: {model} is no folder or hub name of a model that can be loaded. {reason}"
        ) from None
