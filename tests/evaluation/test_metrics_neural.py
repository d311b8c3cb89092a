"""BERTScore and MAUVE: with the real packages where they are installed, and what is ours around them without."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_metrics import outputs_of
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast

from finespun.errors import ModelNotFound, RecipeError
from finespun.evaluation.metrics import metrics_for
from finespun.evaluation.metrics.neural import BertScore, Mauve

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "."]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder of three layers. mauve-text looks for the kind of a model in its path."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


TEXTS = ["the cat sat on the mat .", "", "a dog ran"]
REFERENCES = [["the cat sat .", "a cat"], ["a cat"], ["the dog ran"]]


def test_bertscore_is_what_bert_score_computes(bert: str) -> None:
    package = pytest.importorskip("bert_score", reason="the extra bertscore is not installed")
    metric = metrics_for("en", [f"bertscore:{bert}@2"], True)[0]
    scores = metric.measure(outputs_of(TEXTS, REFERENCES)).per_example
    scorer = package.BERTScorer(model_type=bert, num_layers=2)
    scorer._tokenizer.model_max_length = 100
    _, _, theirs = scorer.score([TEXTS[0], TEXTS[2]], [REFERENCES[0], REFERENCES[2]])
    assert scores is not None
    assert scores.tolist() == [theirs[0].item(), 0, theirs[1].item()]


def test_mauve_is_what_mauve_text_computes(bert: str) -> None:
    package = pytest.importorskip("mauve", reason="the extra mauve is not installed")
    random = np.random.default_rng(0)
    written, human = ([" ".join(random.choice(WORDS[5:], 6)) for _ in range(40)] for _ in range(2))
    measured = Mauve(bert).measure(outputs_of(written, [[text] for text in human]))
    theirs = package.compute_mauve(p_text=human, q_text=written, featurize_model_name=bert).mauve
    assert measured.value() == pytest.approx(theirs, rel=1e-3)
    assert measured.value(np.arange(40)) == measured.value()


def _installed(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("finespun.evaluation.metrics.base.find_spec", lambda name: module)
    monkeypatch.setattr("finespun.evaluation.metrics.neural.version", lambda name: "0")


class _Scorer:
    def __init__(self, model_type: str, num_layers: int) -> None:
        if model_type == "nowhere":
            raise OSError("nowhere is not a local folder\nand more")
        self._tokenizer = SimpleNamespace(model_max_length=10**30)
        self._model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=130))
        self.layers = num_layers

    def score(self, texts: list[str], references: list[list[str]]) -> tuple[torch.Tensor, ...]:
        assert self._tokenizer.model_max_length == 128
        assert all(texts)
        return *[torch.zeros(len(texts))] * 2, torch.tensor([len(r) + self.layers / 10 for r in references])


def test_an_empty_output_scores_0_and_the_others_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "bert_score", BERTScorer=_Scorer)
    metric = BertScore("models/roberta@7")
    scores = metric.measure(outputs_of([*TEXTS, " "], [*REFERENCES, [""]])).per_example
    assert scores.tolist() == pytest.approx([2.7, 0, 1.7, 0])
    assert metric.signature == "refs:best|f1|model:models/roberta|layer:7|idf:no|bert-score:0"


def test_the_layer_is_the_recommended_one_or_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "bert_score.utils", model2layers={"roberta-large": 17})
    _installed(monkeypatch, "bert_score", BERTScorer=_Scorer)
    metric = BertScore("models/roberta-large/")
    metric.measure(outputs_of(["a"], [["a"]]))
    assert "layer:17" in metric.signature
    with pytest.raises(RecipeError, match=r"recommends no layer for my/encoder.*BERTScore:my/encoder@LAYER"):
        BertScore("my/encoder").measure(outputs_of(["a"], [["a"]]))
    with pytest.raises(RecipeError, match="the layer after the @ should be a number"):
        BertScore("my/encoder@last")


def test_a_model_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "bert_score", BERTScorer=_Scorer)
    with pytest.raises(ModelNotFound, match=r"nowhere is no folder or hub name .* a local folder$"):
        BertScore("nowhere@1").measure(outputs_of(["a"], [["a"]]))


def test_mauve_compares_last_states_and_leaves_empty_texts_out(
    monkeypatch: pytest.MonkeyPatch, bert: str, tmp_path: Path
) -> None:
    seen = {}

    def compute_mauve(p_features: np.ndarray, q_features: np.ndarray) -> SimpleNamespace:
        seen.update(human=p_features, written=q_features)
        return SimpleNamespace(mauve=0.5)

    _installed(monkeypatch, "mauve", compute_mauve=compute_mauve)
    measured = Mauve(bert).measure(outputs_of(TEXTS, REFERENCES))
    assert measured.value() == 0.5
    assert (len(seen["written"]), len(seen["human"])) == (2, 3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    model = BertModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        last = model(tokenizer(TEXTS[2], return_tensors="pt").input_ids).last_hidden_state[0, -1]
    assert seen["written"][1] == pytest.approx(last.numpy(), abs=1e-6)
    assert measured.value(np.array([2, 2, 1])) == 0.5
    assert (len(seen["written"]), len(seen["human"])) == (2, 3)
    assert measured.value(np.array([1])) == 0, "nothing was written"
    assert measured.per_example is None
