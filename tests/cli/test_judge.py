"""`finespun judge` from its command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from finespun.cli import main
from finespun.data.templates import Encoder
from finespun.evaluation.outputs import read_outputs
from finespun.models.load import load_model, save_model

pytest.importorskip("fastapi")
pytest.importorskip("choix")
pytest.importorskip("krippendorff")


@pytest.fixture
def outputs(tmp_path: Path) -> list[str]:
    for model in ("one", "two"):
        (tmp_path / model).mkdir()
        lines = [
            {
                "index": row,
                "origin": f"test.jsonl, row {row + 1}",
                "prompt": f"Count to {row}.",
                "references": ["one two three four five six seven eight"],
                "output": f"{model} {row} and so on",
                "finish_reason": "stop",
                "output_tokens": 5,
            }
            for row in range(4)
        ]
        (tmp_path / model / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / "one"), str(tmp_path / "two")]


@contextlib.contextmanager
def judging(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A process that serves, and its links by what they are."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finespun", "judge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    links = {}
    try:
        for line in process.stdout:
            if found := re.match(r"(.*): (http\S+)", line):
                links[found[1]] = found[2]
            if line.startswith("Annotator 2"):
                break
        assert links
        yield process, links
    finally:
        process.kill()
        process.communicate()


def answer(link: str, position: int) -> None:
    form = {"position": str(position), "attempt": "0", "choice": "first"}
    assert httpx.post(f"{link}/answer", data=form).status_code == 303


def test_models_write_first_where_there_is_data(tiny_folder, tmp_path, monkeypatch, write_jsonl, capsys):
    other = load_model(str(tiny_folder))
    with torch.no_grad():
        other.causal_lm.get_input_embeddings().weight.normal_()
    save_model(other, Encoder(other.tokenizer).stop_ids, tmp_path / "other")
    served: list[Any] = []
    monkeypatch.setattr("finespun.evaluation.judging.server.serve", lambda store, *_: served.append(store.study))
    data = write_jsonl({"prompt": "one"}, {"prompt": "two"})
    study = tmp_path / "study.sqlite"
    begin = ["judge", f"tiny={tiny_folder}", f"other={tmp_path / 'other'}", "--data", str(data), "--study", str(study)]
    main([*begin, "--max-new-tokens", "4"])
    main([*begin, "--max-new-tokens", "4"])
    assert served[0] == served[1]
    assert served[0].models == ("tiny", "other")
    shown = {candidate.text for item in served[0].items for candidate in item.candidates}
    for name in ("tiny", "other"):
        outputs = read_outputs(tmp_path / "study" / "evaluations" / name / "outputs.jsonl")
        assert [output.prompt for output in outputs] == ["one", "two"]
        assert all(output.tokens <= 4 for output in outputs)
        assert shown & {output.text for output in outputs}
    with pytest.raises(SystemExit) as exit_:
        main(["judge", str(tiny_folder), str(tmp_path / "other"), "--study", str(tmp_path / "new.sqlite")])
    assert exit_.value.code == 2
    assert "has no outputs" in capsys.readouterr().err


def test_from_outputs_to_preferences(outputs, tmp_path, capsys):
    file = tmp_path / "study.sqlite"
    begin = [*outputs, "--study", str(file), "--annotators", "2", "--port", "0"]
    with judging(*begin) as (process, links):
        httpx.post(f"{links['Annotator 1']}/start")
        for position in range(6):
            answer(links["Annotator 1"], position)
        assert "one" in httpx.get(links["Results"]).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # being told to stop is no failure
    with judging(*begin) as (process, again):  # the same command goes on
        assert Path(links["Annotator 1"]).name == Path(again["Annotator 1"]).name
        answer(again["Annotator 1"], 6)
        process.kill()
    with judging(str(file), "--port", "0") as (_, again):  # and so does the file alone
        assert 'name="position" value="7"' in httpx.get(again["Annotator 1"]).text

    main(["judge", "results", str(file), "--page", str(tmp_path / "r.html")])
    told = capsys.readouterr().out
    assert "by 1 annotator (pairs of texts)" in told
    assert (tmp_path / "r.html").is_file()
    main(["judge", "export", str(file), "--to", str(tmp_path / "all.csv")])
    assert capsys.readouterr().out.startswith("7 answers written")
    main(["judge", "preferences", str(file), "--to", str(tmp_path / "p.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows
    assert {"prompt", "chosen", "rejected"} <= rows[0].keys()
    refused(capsys, "no annotator 3", "results", str(file), "--without", "3")


def refused(capsys: pytest.CaptureFixture[str], why: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["judge", *arguments])
    assert end.value.code == 2
    assert re.search(why, capsys.readouterr().err)


def test_what_cannot_be_is_said(outputs, tmp_path, capsys):
    file = tmp_path / "study.sqlite"
    with judging(*outputs, "--study", str(file), "--port", "0", "--annotators", "2") as (_, links):
        port = re.search(r":(\d+)/", links["Results"])
        assert port
        refused(capsys, f"Cannot listen at 127.0.0.1 port {port[1]}", str(file), "--port", port[1])
    refused(capsys, "annotators is 2 there, not 3", *outputs, "--study", str(file), "--annotators", "3")
    lines = (tmp_path / "two" / "outputs.jsonl").read_text()
    (tmp_path / "two" / "outputs.jsonl").write_text(lines.replace("two 1", "two one"))
    refused(capsys, "it compares other outputs", *outputs, "--study", str(file), "--annotators", "2")
    refused(capsys, "nowhere: has no outputs", str(tmp_path / "nowhere"), outputs[0])
    refused(capsys, "not the file of a study", "results", str(tmp_path / "none.sqlite"))
    refused(capsys, "did you mean --annotators", *outputs, "--anotators", "3")
    refused(capsys, "url: judge.example.org should begin with https", str(file), "--url", "judge.example.org")
