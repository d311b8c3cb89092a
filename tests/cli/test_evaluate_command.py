from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finespun.cli import main
from finespun.evaluation import kept
from finespun.evaluation.outputs import read_outputs
from finespun.models.load import LoadedModel
from finespun.text_model import TextModel


@pytest.fixture(autouse=True)
def own_cache(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "data_cache", lambda: in_tmp / "cache")


def test_the_small_model_is_evaluated_on_the_fables(
    capsys: pytest.CaptureFixture[str], smollm2_shared: LoadedModel
) -> None:
    arguments = ["--data", "fables", "--limit", "2", "--max-new-tokens", "12", "--out", "found"]
    main(["evaluate", "smollm2-135m", *arguments])
    outputs = read_outputs(Path("found/outputs.jsonl"))
    writer = TextModel("smollm2-135m", smollm2_shared)
    prompts = [str(output.prompt) for output in outputs]
    assert [output.text for output in outputs] == writer.generate(prompts, max_new_tokens=12)
    assert str(outputs[0].prompt).startswith("Write a fable titled ")
    assert "\n\nMoral: " in outputs[0].references[0]
    shown = capsys.readouterr().out
    summary = json.loads(Path("found/summary.json").read_text(encoding="utf-8"))
    found = {metric["name"]: metric for metric in summary["metrics"]}
    for name in ("perplexity", "bits per byte", "BLEU", "chrF++", "ROUGE-L", "distinct-2", "ended"):
        assert f"\n{name} " in shown
    assert 5 < found["perplexity"]["value"] < 200, "a model of English finds English neither certain nor random"
    assert 0.5 < found["bits per byte"]["value"] < 3
    assert f"{found['perplexity']['value']:.2f}" in shown
    assert shown.rstrip().endswith("found/report.html")
    assert Path("found/report.html").is_file()


def test_quiet_says_nothing(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.jsonl").write_text('{"prompt": "江雪", "references": ["千山", "鸟飞绝"]}\n', encoding="utf-8")
    arguments = [
        "evaluate",
        str(tiny_folder),
        "--data",
        "x.jsonl",
        "--max-new-tokens",
        "4",
        "--out",
        "found",
        "--quiet",
    ]
    for _ in range(2):
        main(arguments)
        told = capsys.readouterr()
        assert told.out == told.err == "", "the same again is no mistake"
    assert "鸟飞绝" in Path("found/outputs.jsonl").read_text(encoding="utf-8")


def test_sacrebleu_s_command_gives_the_same_figures(tiny_folder: Path, write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl(
        *(
            {"prompt": f"the old {word}", "references": [f"and the {word}", f"a {word} at all"]}
            for word in ("mill", "boat", "heron")
        )
    )
    main(
        [
            "evaluate",
            str(tiny_folder),
            "--data",
            str(file),
            "--metrics",
            "BLEU,chrF++",
            "--language",
            "en",
            "--max-new-tokens",
            "30",
            "--out",
            "found",
            "--quiet",
        ]
    )
    outputs = read_outputs(Path("found/outputs.jsonl"))
    # one text a line, as the command reads them
    lines = [" ".join(output.text.split()) for output in outputs]
    Path("outputs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number in range(2):
        texts = [output.references[number] for output in outputs]
        Path(f"references-{number}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references-0.txt", "references-1.txt", "-i", "outputs.txt"]
    options = ["-m", "bleu", "chrf", "--chrf-word-order", "2", "-b", "-w", "4"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    told = [float(line.strip("[], ")) for line in done.stdout.splitlines() if line.strip("[], \n")]
    summary = json.loads(Path("found/summary.json").read_text(encoding="utf-8"))
    measured = summary["metrics"][2:]
    assert [metric["name"] for metric in measured] == ["BLEU", "chrF++"], "behind the likelihoods"
    assert [round(metric["value"], 4) for metric in measured] == told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "There is no test data: give --data FILE."),
        (["--data", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--data", "x.jsonl", "--metrics", "BLUE"], "There is no metric 'BLUE'. Did you mean BLEU?"),
        (["--data", "x.jsonl", "--strides", "3"], "unknown option --strides; did you mean --stride?"),
        (["--data", "x.jsonl", "--window", "8", "--stride", "8"], "`stride` must be below `window`"),
        (["--data", "x.jsonl", "--name", "x"], "`name` and `out` both say"),
        (["--data", "x.jsonl", "--base"], "is no run folder"),
        (["--data", "x.jsonl", "--logprobs", "1"], "`logprobs` is not kept"),
    ],
)
def test_a_mistake_is_one_message(
    tiny_folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.jsonl").write_text('{"prompt": "the old", "completion": "mill"}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tiny_folder), "--out", "found", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("found").exists()


def test_an_interruption_says_how_to_go_on(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept.Kept, "add", interrupt)
    Path("x.jsonl").write_text('{"prompt": "the old", "completion": "mill"}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tiny_folder), "--data", "x.jsonl", "--out", "found"])
    assert stop.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from finespun.cli import main\n"
        "main(['evaluate', '--help'])\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'sacrebleu') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("--data", "--base", "--metrics", "--exclude-trained", "--temperature"):
        assert word in done.stdout
