from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finespun
from conftest import sentences
from finespun.cli import main
from finespun.generation.engine import SLOTS, Engine
from finespun.runs import RunFolder


def test_help_imports_nothing_heavy() -> None:
    """Its speed is a matter of what it imports; that can be tested without a clock."""
    code = (
        "import sys; from finespun.cli import main\n"
        "for arguments in (['--help'], ['train', '--help'], ['generate', '--help'], ['--version']):\n"
        "    main(arguments)\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("train", "generate", "models", "--training.learning-rate", "--temperature", finespun.__version__):
        assert word in done.stdout


def test_python_m_finespun_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "finespun", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == finespun.__version__


def test_piped_output_is_one_json_object_a_text(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    Path("prompts.jsonl").write_text(
        '{"prompt": "the old"}\n{"messages": [{"role": "user", "content": "江雪"}]}\n', encoding="utf-8"
    )
    main(
        [
            "generate",
            str(tiny_folder),
            "a mill",
            "--prompts-file",
            "prompts.jsonl",
            "--samples",
            "2",
            "--temperature",
            "1",
            "--max-new-tokens",
            "4",
        ]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines[::2]] == ["a mill", "the old", [{"role": "user", "content": "江雪"}]]
    assert len(lines) == 6
    for line in lines:
        assert line.keys() == {"prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens"}


def test_what_is_written_before_an_interruption_is_not_lost(
    tiny_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"the old mill {'by the river ' * (number % 3)}{number}" for number in range(SLOTS + 20)]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    step, passes = Engine.step, 0

    def interrupted(self: Engine) -> bool:
        nonlocal passes
        passes += 1
        if passes == 12:  # the first have ended, those that waited for a slot have not
            raise KeyboardInterrupt
        return step(self)

    command = ["generate", str(tiny_folder), "--prompts-file", "prompts.txt", "--max-new-tokens", "6"]
    main(command)
    everything = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in everything] == prompts
    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 130
    printed = capsys.readouterr().out.splitlines()
    assert 0 < len(printed) < len(prompts)
    assert set(printed) <= set(everything)
    assert len(set(printed)) == len(printed)


def test_a_terminal_gets_the_text_alone(tiny_folder: Path, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "finespun", "generate", str(tiny_folder), "the old", "--max-new-tokens", "6"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=True,
    )
    shown = os.read(reader, 10_000).decode(errors="replace").replace("\r\n", "\n")
    assert shown == finespun.load(tiny_folder).generate("the old", max_new_tokens=6) + "\n"
    assert done.stderr == b""


def test_a_prompt_may_come_from_standard_input(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old\n"))
    main(["generate", str(tiny_folder), "--max-new-tokens", "3"])
    assert json.loads(capsys.readouterr().out)["prompt"] == "the old"


def test_models_says_what_is_here(smollm2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["smollm2-135m"][2] == "yes"
    assert rows["gpt2"][3] == "openai-community/gpt2"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finespun.finetuning.finetune", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--data", "x"])


def test_quiet_is_quiet(tiny_folder: Path, in_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("data.txt").write_text("the old\nferryman\nrowed\n")
    main(["train", "--model", str(tiny_folder), "--data", "data.txt", "--training.max-steps", "1", "--quiet"])
    assert capfd.readouterr() == ("", "")
    main(["generate", "runs/data", "the"])
    assert json.loads(capfd.readouterr().out)["prompt"] == "the"


def test_several_sources_may_follow_one_option(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell writes out a pattern that is not in quotation marks."""
    Path("a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train", "--data", "a.jsonl", "b.jsonl", "--model", "m"])
    assert "b.jsonl: there is no such file" in capsys.readouterr().err


@pytest.fixture
def lines(in_tmp: Path) -> Path:
    path = in_tmp / "lines.txt"
    path.write_text("\n".join(sentences(60)), encoding="utf-8")
    return path


def test_a_plan_says_what_a_run_would_take_and_writes_nothing(
    tiny_folder: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["train", "--model", str(tiny_folder), "--data", str(lines), "--out", "run", "--plan", "--training.epochs", "2"]
    )
    written = capsys.readouterr()
    steps, tokens = re.search(r"^(\d+) steps over ([\d,]+) tokens.*about ", written.out, re.MULTILINE).groups()
    (trained,) = re.search(r"([\d,]+) training tokens", written.err).groups()
    assert int(tokens.replace(",", "")) == 2 * int(trained.replace(",", ""))
    assert int(steps) == 28
    sizes = dict(re.findall(r"^  (.+?) +([\d.]+) GB$", written.out, re.MULTILINE))
    parts = [float(size) for name, size in sizes.items() if name not in ("together", "available")]
    assert {"weights", "gradients", "optimizer", "loss", "together", "available"} <= sizes.keys()
    assert sum(parts) == pytest.approx(float(sizes["together"]), abs=0.05)
    assert not Path("run").exists()


def test_a_search_for_the_rate_draws_the_loss_and_suggests_one_that_works(
    tiny_folder: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_folder), "--data", str(lines), "--quiet"]
    main(["train", *arguments, "--out", "run", "--find-lr"])
    out = capsys.readouterr().out
    assert out.count("•") > 20
    (rate,) = re.search(r"--training.learning-rate (\S+)", out).groups()
    assert 1e-5 < float(rate) < 1
    assert not Path("run").exists()
    main(["train", *arguments, "--out", "run", "--training.learning-rate", rate, "--training.max-steps", "20"])
    losses = [metrics["loss"] for metrics in RunFolder(Path("run")).metrics()]
    assert losses[-1] < losses[0]


def test_a_run_goes_on_with_a_change_that_is_allowed(
    tiny_folder: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--model", str(tiny_folder), "--data", str(lines), "--out", "run", "--training.max-steps", "4"])
    Path("run/report.html").unlink()
    main(["train", "--resume", "run", "--training.max-steps", "6", "--allow-changes"])
    written = capsys.readouterr().err
    assert "Changed: training.max_steps 4 → 6" in written
    assert "Going on after step 4 of 6." in written
    assert [metrics["step"] for metrics in RunFolder(Path("run")).metrics()] == [1, 2, 3, 4, 5, 6]
