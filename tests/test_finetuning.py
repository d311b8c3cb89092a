from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import sentences
from finespun import finetuning
from finespun.recipe import Recipe
from finespun.training.progress import Reporter


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_time_limit_is_measured_in_the_precision_of_the_run(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, method: str, precision: str
) -> None:
    timed: list[torch.dtype] = []
    measure = finetuning.tokens_per_second

    def measured(objective: finetuning.CausalLM, *more: object) -> float:
        timed.append(objective.model.dtype)
        assert measure(objective, *more) > 0
        return 10.0

    monkeypatch.setattr(finetuning, "tokens_per_second", measured)
    settings = {"method": method, "precision": precision, "batch_size": 2, "validation": 0}
    recipe = Recipe.from_keywords(model=str(tiny_folder), out="run", max_minutes=0.2, epochs=50, **settings)
    run = finetuning.finetune(recipe, sentences(12), Reporter(quiet=True))
    assert timed == [getattr(torch, precision)]
    kept = run.folder.recipe().training
    assert kept.max_minutes is None
    assert kept.max_steps == len(run.folder.metrics()) < 300
