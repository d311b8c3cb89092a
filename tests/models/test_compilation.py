from __future__ import annotations

import shutil

import pytest
import torch

from conftest import sentences
from finespun.data.formats import TextExample
from finespun.data.readers import Origin
from finespun.data.templates import Encoder
from finespun.models import compilation
from finespun.models.compilation import can_compile, compile_parts
from finespun.models.load import LoadedModel
from finespun.training.loop import accumulate_gradients
from finespun.training.objectives.causal_lm import CausalLM
from reference import gradients

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(CPU), reason="needs a C++ compiler")
def test_compiled_parts_give_the_same_gradients_at_any_number_of_tokens(tiny: LoadedModel) -> None:
    encoder = Encoder(tiny.tokenizer, "raw")
    examples = [encoder.encode_example(TextExample(text, Origin("t", 1)))[0] for text in sentences(9)]
    objective = CausalLM(tiny.model)
    expected = {}
    for count in (3, 9):
        accumulate_gradients(objective, examples[:count], 200)
        expected[count] = gradients(tiny.model)
    assert compile_parts(objective.decoder) == 2 * 3, "in each of two layers two norms and an MLP"
    for count in (3, 9):
        accumulate_gradients(objective, examples[:count], 200)
        for name, gradient in gradients(tiny.model).items():
            torch.testing.assert_close(gradient, expected[count][name], rtol=1e-4, atol=1e-6)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(CPU)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    assert not can_compile(torch.device("cuda"))
