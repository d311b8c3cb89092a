from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import CHATML, sentences
from finespun import finetuning
from finespun.cli import main
from finespun.recipe import Recipe
from finespun.runs import RunFolder
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


def test_rows_that_are_left_out_trouble_neither_training_nor_samples_nor_the_report(
    tiny_folder: Path, in_tmp: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"prompt": text, "completion": text * 9} for text in sentences(8)]
    held = write_jsonl({"prompt": "a <|im_end|>", "completion": "b"}, good[0], name="held.jsonl")
    data = write_jsonl(*good[1:], {"prompt": "no answer"})
    settings = {"max_steps": 2, "batch_size": 2, "max_new_tokens": 8}
    recipe = Recipe.from_keywords(
        model=str(tiny_folder),
        out="run",
        data={
            "source": [str(data)],
            "validation": [str(held)],
            "format": "prompt-completion",
            "on_bad_row": "skip",
            "max_length": 64,
            "too_long": "cut-left",
        },
        **settings,
    )
    run = finetuning.finetune(recipe, reporter=Reporter())
    manifest = run.folder.manifest()["data"]
    assert (manifest["read"], manifest["dropped"], manifest["train"], manifest["validation"]) == (10, 2, 7, 1)
    assert [sample["prompt"] for sample in run.folder.samples()] == [good[0]["prompt"]]
    reasons = [json.loads(line) for line in run.folder.dropped.read_text(encoding="utf-8").splitlines()]
    assert [(Path(line["file"]).name, line["row"]) for line in reasons] == [("data.jsonl", 8), ("held.jsonl", 1)]
    assert "cut at their beginning" in run.folder.report.read_text(encoding="utf-8")
    assert "7 examples longer than 64 tokens were cut at their beginning" in capsys.readouterr().err


def test_a_prompt_with_several_references_is_one_sample(
    tiny_folder: Path, in_tmp: Path, write_jsonl: Callable[..., Path]
) -> None:
    data = write_jsonl(*({"prompt": text, "completion": text} for text in sentences(6)))
    prompts = ["one", "one", "two", "one", "three"]
    held = write_jsonl(*({"prompt": p, "completion": f"{p} {n}"} for n, p in enumerate(prompts)), name="held.jsonl")
    recipe = Recipe.from_keywords(
        model=str(tiny_folder), out="run", source=[str(data)], validation=[str(held)], max_steps=1, max_new_tokens=2
    )
    run = finetuning.finetune(recipe, reporter=Reporter(quiet=True))
    assert [sample["prompt"] for sample in run.folder.samples()] == ["one", "two", "three"]


def test_samples_are_asked_for_with_their_tools(
    tiny_folder: Path, in_tmp: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    held = write_jsonl({"messages": talk, "tools": tools}, name="held.jsonl")
    data = write_jsonl({"messages": [talk[0], {"role": "assistant", "content": "Here."}], "tools": tools})
    Path("model").mkdir()
    for file in tiny_folder.iterdir():
        (Path("model") / file.name).write_bytes(file.read_bytes())
    Path("model/chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML, encoding="utf-8"
    )
    asked: list[str] = []
    generate = finetuning.generate

    def watched(loaded: finetuning.LoadedModel, encoder: finetuning.Encoder, prompts: list[list[int]], *more: object):
        asked.extend(encoder.decode(prompt, skip_special_tokens=False) for prompt in prompts)
        return generate(loaded, encoder, prompts, *more)

    monkeypatch.setattr(finetuning, "generate", watched)
    recipe = Recipe.from_keywords(
        model="model", out="run", source=[str(data)], validation=[str(held)], max_steps=1, max_new_tokens=2
    )
    finetuning.finetune(recipe, reporter=Reporter(quiet=True))
    assert len(asked) == 2  # before and after
    assert all("look_up" in prompt and "Where?" in prompt for prompt in asked)


def test_the_model_before_training_is_measured_once_for_the_same_weights_and_texts(
    tiny_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: str, model: object = tiny_folder, texts: int = 12, **settings: object) -> tuple[dict, list[str], bool]:
        more = {"max_steps": 2, "max_new_tokens": 4} | settings
        recipe = Recipe.from_keywords(model=str(model), out=out, **more)
        done = finetuning.finetune(recipe, sentences(texts), Reporter()).folder
        measured = "Measuring the model as it is" in capsys.readouterr().err
        results = done.manifest()["results"]["perplexity_before"]
        return results, [sample["before"] for sample in done.samples()], measured

    first = run("a")
    assert first[2]
    assert run("b", learning_rate=1e-3, epochs=2) == (*first[:2], False)
    assert run("c", texts=13)[2]
    assert run("d", max_new_tokens=5)[2]
    trained = run("e", model=Path("a"), texts=12)
    assert trained[2]
    assert trained[0] != first[0]
    run("lora", method="lora")
    assert run("f", model=Path("lora"))[2]  # its base is the same, its adapter is not


def test_texts_that_are_piped_in_are_kept_with_the_run(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = "".join(json.dumps({"text": text}) + "\n" for text in sentences(8))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    command = ["train", "--model", str(tiny_folder), "--data", "-", "--out", "run"]
    main([*command, "--training.max-steps", "1", "--quiet"])
    assert Path("run/data.jsonl").read_text(encoding="utf-8") == piped
    assert Recipe.load("run/recipe.yaml").data.source == [str(Path("run/data.jsonl").absolute())]


def test_metrics_go_to_the_trackers_of_the_recipe_also_after_going_on(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keywords = {"max_steps": 6, "save_every": 2, "trackers": ["tensorboard"], "out": "run", "count": 0}
    recipe = Recipe.from_keywords(model=str(tiny_folder), **keywords)
    append = RunFolder.append_metrics

    def append_and_stop(self: RunFolder, metrics: dict) -> None:
        append(self, metrics)
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(recipe, sentences(20), Reporter(quiet=True))
    finetuning.resume("run", Reporter(quiet=True))
    events = accumulator.EventAccumulator("run/tensorboard").Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    written = {line["step"]: line["loss"] for line in RunFolder(Path("run")).metrics()}
    assert logged == pytest.approx(written)
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
