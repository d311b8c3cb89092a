"""Metrics during training: what `finespun evaluate` says, a training that does not notice, and a choice by them."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import sentences
from finespun import finetuning
from finespun.data.prepare import encoder_for
from finespun.data.texts import read_texts
from finespun.errors import DataError, FinespunError, RecipeError, RunError, TrainingInterrupted
from finespun.evaluation import during_training
from finespun.evaluation.during_training import SampleEvaluation, sample_evaluation
from finespun.evaluation.evaluate import COPIED, evaluate
from finespun.evaluation.metrics import METRICS, WITH_A_MODEL
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from finespun.recipe import METRICS as NAMES
from finespun.recipe import METRICS_WITH_A_MODEL, DataRecipe, EvaluationRecipe, Recipe
from finespun.runs import RunFolder
from finespun.training.checkpoint import newest_checkpoint
from finespun.training.progress import Reporter

QUIET = Reporter(quiet=True)

ROWS = [{"prompt": sentence[:20], "completion": sentence[20:]} for sentence in sentences(24)]
HELD = [
    *({"prompt": sentence[:16], "completion": sentence[16:] + " 雪"} for sentence in sentences(40)[24:33]),
    {"prompt": sentences(25)[24][:16], "completion": "another answer to the first prompt"},
]
MEASURED = ["chrF++", "ROUGE-L", "rep-4", "distinct-1", "length", "copied-4"]


@pytest.fixture
def recipe(tiny_folder: Path, in_tmp: Path, write_jsonl: Callable[..., Path]) -> Callable[..., Recipe]:
    """Makes recipes of a run of eight steps with an evaluation after each second one."""
    data, held = write_jsonl(*ROWS, name="train.jsonl"), write_jsonl(*HELD, name="held.jsonl")

    def make(out: str, evaluation: dict[str, Any] | None = None, **keywords: Any) -> Recipe:
        chosen = {"every": 2, "metrics": MEASURED, "max_output_tokens": 12} | (evaluation or {})
        settings = {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "validate_every": 3, "save_every": 4}
        return Recipe.from_keywords(
            model=str(tiny_folder),
            data={"source": [str(data)], "validation": [str(held)]},
            out=out,
            count=0,
            evaluation=chosen if evaluation != {} else {},
            **settings | {"precision": "float32"} | keywords,
        )

    return make


def lines_of(run: str) -> list[dict[str, Any]]:
    """What was recorded of each step, but for the speed."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in RunFolder(Path(run)).metrics()]


def weights_of(run: str) -> bytes:
    (file,) = Path(run, "model").glob("*.safetensors")
    return file.read_bytes()


def test_the_recipe_knows_the_metrics_that_there_are() -> None:
    assert set(NAMES) == {*METRICS, *COPIED}
    assert set(METRICS_WITH_A_MODEL) == set(WITH_A_MODEL)
    assert all(make(None).name == name for name, make in METRICS.items())


# The values


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.6, "gradient_checkpointing": "selective", "neftune_alpha": 5.0},
        {"method": "lora", "rank": 4, "learning_rate": 0.05},
        {"method": "prefix-tuning", "learning_rate": 0.1},
    ],
    ids=["average", "lora", "prefix"],
)
def test_a_value_is_what_evaluate_says_of_the_same_weights_and_rows(
    recipe: Callable[..., Recipe], options: dict[str, Any]
) -> None:
    run = finetuning.finetune(recipe("run", {"best_by": "chrF++"}, **options), reporter=QUIET)
    kept = run.folder.manifest()["results"]
    assert kept["best_by"] == "chrF++"
    (recorded,) = [line for line in run.folder.metrics() if line["step"] == kept["best_step"]]
    folder = evaluate(
        "run",
        EvaluationData(source=["held.jsonl"]),
        EvaluationSettings(metrics=MEASURED, likelihood="off"),
        Sampling(max_new_tokens=12),
    )
    said = {each["name"]: each["value"] for each in json.loads((folder / "summary.json").read_text())["metrics"]}
    assert {name: recorded[name] for name in MEASURED} == said
    values = {name: {line[name] for line in run.folder.metrics() if name in line} for name in MEASURED}
    assert len(values["chrF++"]) > 1, "the model must change for this to mean anything"
    assert recorded["chrF++"] == max(values["chrF++"])


def test_it_is_measured_every_so_many_steps_and_at_the_last_and_said(recipe: Callable[..., Recipe]) -> None:
    said: list[str] = []
    reporter = Reporter(quiet=True)
    reporter.say = said.append
    asked = recipe("run", {"every": 3}, max_steps=8)
    assert "Beside that, 3 evaluations on 9 prompts." in finetuning.plan(asked, QUIET)
    run = finetuning.finetune(asked, reporter=reporter)
    measured = [line for line in run.folder.metrics() if set(MEASURED) <= line.keys()]
    assert [line["step"] for line in measured] == [3, 6, 8]
    assert sum(bool(set(MEASURED) & line.keys()) for line in run.folder.metrics()) == 3
    for line in measured:
        assert f"step {line['step']}/8  chrF++ {line['chrF++']:.4g}  ROUGE-L {line['ROUGE-L']:.4g}" in "\n".join(said)


def test_without_names_what_fits_the_data_is_measured_and_written_down(recipe: Callable[..., Recipe]) -> None:
    asked = {"metrics": None, "best_by": "token-f1", "every": 8, "max_output_tokens": 4}
    run = finetuning.finetune(recipe("run", asked), reporter=QUIET)
    names = run.folder.recipe().evaluation.metrics
    assert {"BLEU", "chrF++", "ROUGE-L", "rep-4", "ended", "token-F1"} <= set(names)
    assert set(names) <= run.folder.metrics()[-1].keys()


# The sample


def sample(tiny: LoadedModel, **settings: Any) -> SampleEvaluation:
    data = DataRecipe(source=["train.jsonl"], validation=["held.jsonl"])
    texts = read_texts(data)
    seed = settings.pop("seed", 0)
    asked = EvaluationRecipe(**{"every": 1, "metrics": ["chrF++"], "max_output_tokens": 12} | settings)
    found = sample_evaluation(asked, texts, encoder_for(texts, tiny.tokenizer, data), tiny.context_length, seed)
    assert found
    return found


def test_prompts_are_drawn_with_the_seed_and_have_all_their_answers(
    tiny: LoadedModel, recipe: Callable[..., Recipe]
) -> None:
    everything = sample(tiny, examples=100)
    asked = [example.prompt for example in everything.examples]
    assert asked == list(dict.fromkeys(row["prompt"] for row in HELD))
    assert everything.examples[0].references == [HELD[0]["completion"], HELD[-1]["completion"]]
    drawn = [[example.prompt for example in sample(tiny, examples=4, seed=seed).examples] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) > 2
    for each in drawn:
        assert len(each) == 4
        assert sorted(each, key=asked.index) == each


def test_prompts_that_leave_no_room_or_are_refused_are_not_drawn(
    tiny: LoadedModel, in_tmp: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(*ROWS, name="train.jsonl")
    held = [HELD[0], {"prompt": "a <|im_end|>", "completion": "b"}, {"prompt": "river " * 200, "completion": "b"}]
    write_jsonl(*held, name="held.jsonl")
    assert [example.prompt for example in sample(tiny, examples=1).examples] == [HELD[0]["prompt"]]


def test_an_evaluation_leaves_model_and_random_numbers_as_they_were(
    tiny: LoadedModel, recipe: Callable[..., Recipe]
) -> None:
    evaluation = sample(tiny, metrics=["chrF++", "distinct-1", "self-BLEU"])
    texts = read_texts(DataRecipe(source=["train.jsonl"], validation=["held.jsonl"]))
    encoder = encoder_for(texts, tiny.tokenizer, DataRecipe())

    def state() -> list[Any]:
        forwards = [name for name, module in tiny.model.named_modules() if "forward" in vars(module)]
        numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        return [numbers, forwards, tiny.model.config._attn_implementation, tiny.model.training]

    before, weights = state(), [parameter.detach().clone() for parameter in tiny.model.parameters()]
    first = evaluation.scores(tiny, encoder)
    assert state() == before
    assert all(torch.equal(*pair) for pair in zip(weights, tiny.model.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())
    assert evaluation.scores(tiny, encoder) == first


# The training


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": "full", "neftune_alpha": 5.0, "ema_decay": 0.9},
        {"precision": "bfloat16"},
        {"method": "lora"},
        {"method": "prompt-tuning"},
        {"optimizer": "schedule-free-adamw", "precision": "bfloat16"},
    ],
    ids=["full", "bfloat16", "lora", "prompt", "schedule-free"],
)
def test_a_training_is_the_same_with_and_without(recipe: Callable[..., Recipe], options: dict[str, Any]) -> None:
    finetuning.finetune(recipe("without", {}, **options), reporter=QUIET)
    finetuning.finetune(recipe("with", **options), reporter=QUIET)
    plain = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines_of("with")]
    assert plain == lines_of("without")
    assert any("chrF++" in line for line in lines_of("with"))
    for file in Path("without/checkpoints").rglob("*.safetensors"):
        assert file.read_bytes() == Path("with", *file.parts[1:]).read_bytes()
    assert weights_of("with") == weights_of("without")


def test_the_kept_model_is_that_of_the_best_step_with_its_perplexity(recipe: Callable[..., Recipe]) -> None:
    """`loops` of nothing that loops is the same at each step, so that the first one is kept."""
    asked = {"metrics": ["loops"], "best_by": "loops", "max_output_tokens": 1}
    run = finetuning.finetune(recipe("run", asked), reporter=QUIET)
    assert run.folder.manifest()["results"]["best_step"] == 2
    short = finetuning.finetune(recipe("short", {}, max_steps=2, schedule="constant"), reporter=QUIET)
    again = finetuning.finetune(recipe("again", asked, schedule="constant"), reporter=QUIET)
    assert weights_of("short") == weights_of("again")
    after = [each.folder.manifest()["results"]["perplexity_after"]["value"] for each in (short, again)]
    assert after[0] == after[1], "of that step, at which nothing was validated"


# Stopping and going on


def stop_at(evaluation: int, monkeypatch: pytest.MonkeyPatch, pieces: list[str]) -> None:
    """Ctrl-C at the beginning of that evaluation."""
    generate, calls = during_training.generate, []

    def watched(*arguments: Any, on_text: Callable[[int, int, str], None]) -> Any:
        calls.append(1)
        if len(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGINT)

        def look(prompt: int, sample: int, text: str) -> None:
            pieces.extend([text] * (len(calls) == evaluation))
            on_text(prompt, sample, text)

        return generate(*arguments, on_text=look)

    monkeypatch.setattr(during_training, "generate", watched)


@pytest.mark.parametrize("evaluation", [1, 3, 4], ids=["first", "third", "last"])
def test_stopped_in_an_evaluation_and_resumed_equals_uninterrupted(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    options = {"ema_decay": 0.6, "keep_checkpoints": 1, "save_every": 100}
    finetuning.finetune(recipe("whole", {"best_by": "chrF++"}, **options), reporter=QUIET)
    pieces: list[str] = []
    with monkeypatch.context() as patch:
        stop_at(evaluation, patch, pieces)
        with pytest.raises(TrainingInterrupted, match=rf"after step {2 * evaluation} of 8, and saved. Go on with"):
            finetuning.finetune(recipe("broken", {"best_by": "chrF++"}, **options), reporter=QUIET)
    assert len(pieces) == 1, "it was not written to its end"
    saved = newest_checkpoint(Path("broken/checkpoints")).state
    assert (saved.step, saved.recorded) == (2 * evaluation, 2 * evaluation - 1)
    assert [line["step"] for line in lines_of("broken")] == list(range(1, 2 * evaluation))
    if evaluation == 3:  # once more, in the same place
        with monkeypatch.context() as patch:
            stop_at(1, patch, pieces)
            with pytest.raises(TrainingInterrupted, match="after step 6 of 8"):
                finetuning.resume("broken", QUIET)
    finetuning.resume("broken", QUIET)
    assert lines_of("broken") == lines_of("whole")
    assert weights_of("broken") == weights_of("whole")
    results = [RunFolder(Path(run)).manifest()["results"] for run in ("whole", "broken")]
    assert results[0] == results[1]


def test_a_metric_that_fails_leaves_a_run_that_can_go_on(recipe: Callable[..., Recipe]) -> None:
    Path("own.py").write_text(
        "from pathlib import Path\n"
        "better = 'lower'\n"
        "def score(output, references):\n"
        "    if Path('broken').exists():\n"
        "        raise ValueError('no such word')\n"
        "    return len(output)\n"
    )
    asked = {"metrics": ["own:score", "length"], "best_by": "own:score"}
    finetuning.finetune(recipe("whole", asked), reporter=QUIET)
    append = RunFolder.append_metrics

    def append_and_break(self: RunFolder, metrics: dict) -> None:
        append(self, metrics)
        if metrics["step"] == 3:
            Path("broken").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append_and_break)
        with pytest.raises(DataError, match=r"After step 4, which is saved: own:score failed .*no such word"):
            finetuning.finetune(recipe("run", asked), reporter=QUIET)
    Path("broken").unlink()
    with pytest.raises(RunError, match=r"evaluation.every 2 → 4"):
        finetuning.resume("run", QUIET, changes={"evaluation": {"every": 4}})
    finetuning.resume("run", QUIET)
    assert lines_of("run") == lines_of("whole")
    assert weights_of("run") == weights_of("whole")


# What cannot be


@pytest.mark.parametrize(
    ("evaluation", "data", "said"),
    [
        ({"metrics": ["length"], "best_by": "length"}, {}, "evaluation.best_by length: neither more of it is better"),
        ({}, {"validation": 0.0}, "evaluation.every: measures on held-out texts, and there are none"),
        ({"metrics": ["BLEU", "rep-4"]}, {"source": ["t.txt"], "validation": 0.2}, "BLEU: compares with answers"),
        ({"metrics": ["nowhere:score"]}, {}, "no module nowhere"),
        ({"language": "Chinese"}, {}, "ISO 639-1"),
    ],
    ids=["direction", "nothing held out", "plain texts", "no module", "language"],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(
    recipe: Callable[..., Recipe], evaluation: dict[str, Any], data: dict[str, Any], said: str
) -> None:
    Path("t.txt").write_text("\n".join(sentences(20)), encoding="utf-8")
    asked = recipe("run", {"every": 2} | evaluation)
    asked.data = asked.data.model_copy(update=data)
    with pytest.raises(FinespunError) as error:
        finetuning.finetune(asked, reporter=QUIET)
    assert said in str(error.value)
    assert not Path("run").exists()


def test_a_package_that_is_missing_is_said_before_anything_is_written(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finespun.evaluation.metrics.base.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"chrF\+\+ needs the package sacrebleu: pip install"):
        finetuning.finetune(recipe("run"), reporter=QUIET)
    assert not Path("run").exists()
