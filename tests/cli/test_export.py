from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import finespun
from conftest import sentences
from finespun.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments])
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    return written.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from finespun.cli import main\n"
        "main(['export', '--help'])\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in (
        "hf",
        "adapter",
        "merged",
        "gguf",
        "ollama",
        "vllm",
        "card",
        "--out",
        "--precision",
        "--type",
        "--push",
    ):
        assert word in done.stdout


def test_a_run_is_exported_and_the_command_says_where(
    tiny_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text} for text in sentences(12)]
    finespun.finetune(model=str(tiny_folder), data=rows, out="run", max_steps=1, quiet=True)
    main(["export", "run", "--to", "hf", "--precision", "float16"])
    assert capsys.readouterr().out == "Written to run/export/hf\n"
    assert json.loads(Path("run/export/hf/config.json").read_text())["dtype"] == "float16"
    main(["export", "run", "--to", "card", "--out", "card"])
    assert ModelCard.load("card/README.md").data.tags == ["finespun", "full"]
    assert [path.name for path in Path("card").iterdir()] == ["README.md"]
    main(["export", "run", "--to", "vllm"])
    assert "Serve it: run/export/vllm/serve.sh" in capsys.readouterr().out


def test_what_there_is_to_choose_from_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = refused(capsys, "run", "--to", "onnx")
    assert '"hf", "adapter", "merged", "gguf", "ollama", "vllm", "card"' in unknown
    unknown = refused(capsys, "run", "--to", "hf", "--precision", "int8")
    assert '"float32", "bfloat16", "float16"' in unknown
    assert '"q8_0"' in refused(capsys, "run", "--to", "gguf", "--type", "q9")
    assert "--to" in refused(capsys, "run")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--to", "gguf", "--precision", "float16"], "with gguf, give --type"),
        (["--to", "card", "--precision", "float16"], "with card, leave it out"),
        (["--to", "hf", "--type", "q8_0"], "with hf, give --precision"),
        (["--to", "adapter", "--type", "q8_0"], "with adapter, leave it out"),
        (["--to", "vllm", "--push", "me/writer"], "--push does not go with vllm"),
    ],
)
def test_settings_that_exclude_each_other(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in refused(capsys, "run", *arguments)


def test_what_is_neither_a_run_nor_a_model(tiny_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "neither config.json nor adapter_config.json" in refused(capsys, "empty", "--to", "hf")
    assert "holds no run" in refused(capsys, "empty", "--to", "card")
    assert "--out FOLDER" in refused(capsys, "no-such-run", "--to", "hf")
    assert "was not found" in refused(capsys, "no-such-run", "--to", "hf", "--out", "out")
    assert "holds no run" in refused(capsys, str(tiny_folder), "--to", "card", "--out", "out")
    assert not Path("out").exists()
    assert list(Path("empty").iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(
    tiny_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/poem.txt").write_text("snow")
    Path("file").write_text("snow")
    for out in ("taken", "file"):
        assert "Choose another --out" in refused(capsys, str(tiny_folder), "--to", "hf", "--out", out)
    assert Path("taken/poem.txt").read_text() == Path("file").read_text() == "snow"
