"""`finespun compare` on evaluation folders, on models that it evaluates first, with a judge behind a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

from conftest import WORDS
from finespun.cli import main
from finespun.evaluation import kept
from finespun.evaluation.outputs import Output, output_line

REFERENCES = [" ".join(np.random.default_rng(row).choice(WORDS, 7 + row % 6)) + f" {row}" for row in range(40)]
INJECTION = "</script><img src=x onerror=alert(1)>"
POEM = "千山鸟飞绝，万径人踪灭。"


def texts(noise: float, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [
        " ".join(str(random.choice(WORDS)) if random.random() < noise else word for word in reference.split())
        for reference in REFERENCES
    ]


def evaluation(
    folder: Path,
    written: Sequence[str],
    nats: float = 2.0,
    tokens: int = 10,
    references: bool = True,
    **settings: Any,
) -> Path:
    """An evaluation folder as `finespun evaluate` leaves it."""
    folder.mkdir(parents=True)
    lines = [
        output_line(
            Output(row, f"test.jsonl, row {row + 1}", f"写 {row}", (REFERENCES[row],) * references, text, "stop", 9)
        )
        for row, text in enumerate(written)
    ]
    likelihood = {"nats": nats * tokens, "tokens": tokens, "text_nats": nats * tokens, "bytes": 50}
    scores = [{"index": row, "scores": {}, "likelihood": likelihood} for row in range(len(written))]
    summary = {
        "model": {"name": f"runs/{folder.name}"},
        "settings": {"data": {}, "evaluation": {}, "generation": settings},
        "metrics": [
            {"name": name, "signature": "all|window:128"}
            for name in ("perplexity", "bits per byte", *["BLEU"] * references)
        ],
    }
    (folder / "outputs.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture
def pair(in_tmp: Path) -> tuple[Path, Path]:
    """A system that is clearly better than another."""
    return evaluation(in_tmp / "base", texts(0.6, 1)), evaluation(in_tmp / "tuned", texts(0.2, 2), nats=1.5)


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "comparison.json").read_text(encoding="utf-8"))


def difference(out: Path, metric: str) -> dict[str, Any]:
    (one,) = [each for each in found(out)["differences"] if each["metric"] == metric]
    return one


def test_two_evaluations_are_compared_in_a_table_a_file_and_a_page(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", "base", "tuned"])
    said = capsys.readouterr().out
    out = Path("comparisons/base-tuned")
    bleu = [sacrebleu.corpus_bleu(texts(*how), [REFERENCES]).score for how in ((0.6, 1), (0.2, 2))]
    assert difference(out, "BLEU")["value"] == pytest.approx(bleu[1] - bleu[0], abs=1e-9)
    assert difference(out, "BLEU")["better"] == "runs/tuned"
    row = next(line for line in said.splitlines() if line.startswith("BLEU"))
    assert f"{bleu[0]:.2f}" in row
    assert f"{bleu[1]:.2f}" in row
    assert f"+{bleu[1] - bleu[0]:.2f}" in row
    assert row.endswith("runs/tuned is better")
    assert re.search(r"length .* no difference shown$", said, re.MULTILINE)
    assert re.search(r"^runs/tuned is better than runs/base in \d of \d+ metrics$", said, re.MULTILINE)
    assert (out / "comparison.html").is_file()
    assert difference(out, "perplexity")["value"] == pytest.approx(np.exp(1.5) - np.exp(2.0))
    assert difference(out, "bits per byte")["value"] == pytest.approx((15 - 20) / 50 / np.log(2))
    assert difference(out, "perplexity")["better"] == "runs/tuned"
    assert difference(out, "distinct-2")["wins"] is None


def test_no_difference_is_said_so(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation(in_tmp / "one", texts(0.4, 1))
    evaluation(in_tmp / "two", texts(0.4, 2))
    main(["compare", "one", "two", "--metrics", "BLEU,chrF++"])
    assert "No difference shown between runs/one and runs/two" in capsys.readouterr().out
    result = found(Path("comparisons/one-two"))
    assert [metric["name"] for metric in result["metrics"]] == ["BLEU", "chrF++"]
    assert not any(each["shown"] for each in result["differences"])


def test_three_systems_with_names_of_their_own(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluation(Path("third"), texts(0.2, 3), nats=1.5, temperature=0.7)
    main(["compare", "基础=base", "tuned", "third", "--metrics", "BLEU", "--out", "three"])
    result = found(Path("three"))
    assert [(each["first"], each["second"]) for each in result["differences"]] == [
        ("基础", "runs/tuned"),
        ("基础", "runs/third"),
        ("runs/tuned", "runs/third"),
    ]
    assert [each["shown"] for each in result["differences"]] == [True, True, False]
    (note,) = result["notes"]
    assert note == "generation.temperature differs: not set for 基础, not set for runs/tuned, 0.7 for runs/third"
    said = capsys.readouterr().out
    assert note in said
    assert "Of 3 differences between any two of the 3 systems, 2 are shown" in said


def test_perplexities_over_other_tokens_are_not_compared(pair: tuple[Path, Path]) -> None:
    shutil.rmtree("tuned")
    evaluation(Path("tuned"), texts(0.2, 2), nats=1.5, tokens=12)
    main(["compare", "base", "tuned", "--quiet"])
    names = [metric["name"] for metric in found(Path("comparisons/base-tuned"))["metrics"]]
    assert "bits per byte" in names
    assert "perplexity" not in names


def test_without_references_the_rest_is_compared(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        evaluation(in_tmp / name, texts(0.4, seed), references=False)
    main(["compare", "one", "two"])
    assert "distinct-1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", "one", "two", "--metrics", "BLEU"])
    assert "40 of 40 examples have none (the first: test.jsonl, row 1)" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = evaluation(Path("other"), texts(0.2, 2))
    file = other / "outputs.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"写 7"', '"写 eight"'), encoding="utf-8")
    said = refused(capsys, "base", "other")
    assert "given other prompts" in said
    assert '"写 eight"' in said
    assert not Path("comparisons").exists()
    assert "two systems or more" in refused(capsys, "base")
    assert "give each a name" in refused(capsys, "x=base", "x=tuned")
    assert "--data FILE" in refused(capsys, "base", "runs/nowhere")
    assert "go together" in refused(capsys, "base", "tuned", "--judge-url", "http://localhost/v1")
    assert "--judge-url" in refused(capsys, "base", "tuned", "--rubric", "rubric.txt")
    shutil.copytree("tuned", "run/evaluations/test")
    assert "It has the evaluations run/evaluations/test" in refused(capsys, "base", "run")
    (Path("tuned") / "summary.json").write_text("{}")
    assert "evaluated anew" in refused(capsys, "base", "tuned")


def test_the_page_shows_where_they_differ_and_lets_nothing_in(
    in_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, better = texts(0.5, 1), texts(0.5, 2)
    worse[3], better[3] = INJECTION, REFERENCES[3]
    worse[8], better[8] = REFERENCES[8], POEM
    evaluation(in_tmp / "base", worse)
    evaluation(in_tmp / "tuned", better)
    main(["compare", "base", "<b>x=tuned", "--out", "out"])
    page = Path("out/comparison.html").read_text(encoding="utf-8")
    (furthest,) = found(Path("out"))["furthest"]
    assert (furthest["second_ahead"][0], furthest["first_ahead"][0]) == (3, 8)
    assert INJECTION not in page
    assert "<img" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    ahead, behind = re.split(r"<h3>runs/base furthest ahead</h3>", page)
    assert "test.jsonl, row 4</strong>" in ahead
    assert "&lt;img src=x" in ahead
    assert "test.jsonl, row 9</strong>" in behind
    assert POEM in behind
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium draws the page, and is not here")
    address = Path("out/comparison.html").absolute().as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}"]
    done = subprocess.run(
        [chromium, *options, "--virtual-time-budget=2000", "--dump-dom", address], capture_output=True, timeout=60
    )
    shown = done.stdout.decode()
    assert "No difference shown" in shown or "is better" in shown
    assert POEM in shown


@pytest.fixture
def address() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A judge that prefers the response with more of the reference's words; one question it does not understand."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            asked = body["messages"][1]["content"]
            parts = dict(re.findall(r"<([a-z]+(?:-\d)?)-\w+>\n(.*?)\n</", asked, re.DOTALL))
            reference = set(parts["reference"].split())
            one, two = (len(reference & set(parts[f"response-{place}"].split())) for place in (1, 2))
            said = "eh" if parts["task"] == "写 0" else f"VERDICT: {1 if one > two else 2 if two > one else 'TIE'}"
            value = {"choices": [{"message": {"content": said}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
            payload = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_once_and_what_it_says_is_reported(
    pair: tuple[Path, Path], address: tuple[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, bodies = address
    Path("rubric.txt").write_text("要押韵。", encoding="utf-8")
    arguments = ["compare", "base", "tuned", "--metrics", "BLEU", "--judge-url", url, "--judge-model", "judge"]
    main([*arguments, "--rubric", "rubric.txt"])
    said = capsys.readouterr().out
    judged = found(Path("comparisons/base-tuned"))["judge"]
    assert all("要押韵。" in body["messages"][0]["content"] for body in bodies)
    (both,) = judged["pairs"]
    wins = both["wins"]
    assert both["outcomes"]["0"] == "failed"
    assert wins["wins"] + wins["ties"] + wins["losses"] == 39
    assert wins["rate"]["low"] > 0.5
    assert (both["agreement"], both["kappa"]) == (1.0, 1.0)
    assert len(judged["failures"]) == 2
    assert judged["prompt_tokens"] == 9 * len(bodies)
    assert "runs/tuned is better." in said
    assert "1 of 40 (2.5 %) examples have no verdict and are not counted" in said
    assert "2 questions failed" in said
    assert "test.jsonl, row 1: no verdict in 3 replies" in said
    page = Path("comparisons/base-tuned/comparison.html").read_text(encoding="utf-8")
    assert "要押韵。" in page
    assert "judge: runs/tuned is better" in page
    asked = len(bodies)
    main([*arguments, "--rubric", "rubric.txt", "--quiet"])
    assert len(bodies) == asked + 2 * 3, "only what failed is asked again"


def test_models_are_evaluated_first(
    tiny_folder: Path,
    in_tmp: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same model under two names, once evaluated here and once before: the same figures as `evaluate` gives."""
    monkeypatch.setattr(kept, "data_cache", lambda: in_tmp / "cache")
    file = write_jsonl(*({"prompt": f"the old {row}", "completion": f" ferryman {row}"} for row in range(6)))
    options = ["--data", str(file), "--max-new-tokens", "6", "--metrics", "BLEU,length", "--quiet"]
    main(["evaluate", str(tiny_folder), "--out", "before", *options])
    main(["compare", f"new={tiny_folder}", "before", "--out", "out", *options])
    result, summary = (json.loads(Path(f).read_text()) for f in ("out/comparison.json", "before/summary.json"))
    values = {metric["name"]: metric for metric in summary["metrics"]}
    for metric in result["metrics"]:
        for system in metric["systems"]:
            assert system == {key: pytest.approx(values[metric["name"]][key]) for key in ("value", "low", "high")}
        assert metric["signature"] == values[metric["name"]]["signature"]
    assert (Path("out/evaluations/new") / "summary.json").is_file()
    assert not any(each["shown"] for each in result["differences"])
    assert capsys.readouterr().out == ""
