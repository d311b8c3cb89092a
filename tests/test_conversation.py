"""A conversation: what the model gets to see after each command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finespun.cli import main
from finespun.conversation import Conversation
from finespun.errors import DataError, GenerationError, RecipeError
from finespun.generation.constraints import Constraint
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from finespun.text_model import TextModel


@pytest.fixture
def model(tiny: LoadedModel, tiny_folder: Path) -> TextModel:
    return TextModel(str(tiny_folder), tiny)


def silent(piece: str) -> None:
    pass


def test_an_answer_is_what_generate_gives_for_the_conversation(model: TextModel, tiny: LoadedModel) -> None:
    talk = Conversation(model, Sampling(max_new_tokens=8))
    talk.system = "You row boats."
    heard: list[str] = []
    answers = [talk.say(text, heard.append) for text in ("hello", "and the mill?")]
    messages = [{"role": "system", "content": "You row boats."}]
    for said, answer in zip(("hello", "and the mill?"), answers, strict=True):
        messages.append({"role": "user", "content": said})
        assert model.generate([messages], max_new_tokens=8) == [answer]
        messages.append({"role": "assistant", "content": answer})
    assert talk.messages == messages
    assert "".join(heard) == "".join(answers)


def test_what_was_said_can_be_taken_back_and_said_again(model: TextModel, tmp_path: Path) -> None:
    talk = Conversation(model, Sampling(max_new_tokens=6, temperature=1.0, seed=4))
    first = talk.say("hello", silent)
    talk.say("more", silent)
    assert talk.undo() == "more"
    again = talk.regenerate(silent)
    assert again != first
    assert talk.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": again}]
    assert [again] == model.generate(
        [[{"role": "user", "content": "hello"}]], max_new_tokens=6, temperature=1.0, seed=5
    )
    talk.save(tmp_path / "talks.jsonl")
    talk.save(tmp_path / "talks.jsonl")
    lines = (tmp_path / "talks.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"messages": talk.messages}] * 2
    talk.undo()
    with pytest.raises(GenerationError, match="Nothing has been said"):
        talk.undo()


def test_settings_are_checked(model: TextModel) -> None:
    talk = Conversation(model, Sampling())
    talk.set("temperature", "0.8")
    talk.set("stop", '["."]')
    assert (talk.sampling.temperature, talk.sampling.stop) == (0.8, ["."])
    with pytest.raises(RecipeError, match="Did you mean temperature"):
        talk.set("temprature", "1")
    with pytest.raises(RecipeError, match="temperature"):
        talk.set("temperature", "warm")
    assert talk.sampling.temperature == 0.8


def test_a_turn_that_does_not_fit_is_forgotten(model: TextModel) -> None:
    talk = Conversation(model, Sampling(max_new_tokens=4))
    talk.say("hello", silent)
    with pytest.raises(DataError, match="context 128"):
        talk.say("the old ferryman " * 60, silent)
    assert len(talk.turns) == 2


def test_an_answer_that_a_setting_makes_impossible_is_no_turn(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Constraint, token: int) -> None:
        raise GenerationError("too large")

    monkeypatch.setattr(Constraint, "take", breaks)
    talk = Conversation(model, Sampling(regex="[ab]{9}"))
    with pytest.raises(GenerationError, match="too large"):
        talk.say("hello", silent)
    assert talk.turns == []


def test_an_interrupted_answer_ends_where_it_is(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, Sampling(max_new_tokens=50))
    heard: list[str] = []

    def interrupt(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 3:
            raise KeyboardInterrupt

    assert talk.say("hello", interrupt) == "".join(heard)
    assert talk.turns[-1]["content"] == "".join(heard)
    assert talk.say("hello again", silent)


def test_talking_over_a_pipe(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = 'hello\n/temperature 0\n"""\ntwo\nlines\n"""\n/undo\n/save said.jsonl\n'
    command = ["chat", str(tiny_folder), "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "finespun", *command], input=turns, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (saved,) = map(json.loads, (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines())
    assert saved["messages"][0]["content"] == "hello"
    assert done.stdout.startswith(saved["messages"][1]["content"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/temprature 1\n"))
    with pytest.raises(SystemExit) as stop:
        main(command)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "Did you mean temperature" in err
