"""The report: right figures, nothing that a text could inject or the network could add, charts that a browser draws."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finespun.data.check import check_texts
from finespun.data.texts import read_texts
from finespun.recipe import DataRecipe, Recipe
from finespun.reports.data import write_check
from finespun.reports.figures import count, duration, percent, perplexity
from finespun.reports.training import _change, _length_limit, write_report
from finespun.runs import RunFolder

ALERT = "<script>alert(1)</script>"
BREAKOUT = '</script></style></div><img src=x onerror="alert(2)">'
CHINESE = "从前有一只狐狸，\n住在山脚下的竹林里。"

RunMaker = Callable[..., RunFolder]


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


RESULTS = {
    "best_step": 90,
    "perplexity_before": interval(34.21, 31.04, 37.88),
    "perplexity_after": interval(19.84, 18.02, 21.93),
    "perplexity_ratio": interval(0.58, 0.5512, 0.6149),
}


def metrics(steps: int, validate_every: int | None) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "epoch": step / 40,
            "loss": 2.9 + 0.6 * math.exp(-step / 30) + 0.15 * math.sin(step * 7.3),
            "learning_rate": 2e-4 * min(1, step / 6) * (0.5 + 0.5 * math.cos(math.pi * step / (steps + 1))),
            "gradient_norm": 1.2,
            "tokens": 4000 + 300 * (step % 7),
            "tokens_per_second": 2100.0 + 40 * (step % 5),
        }
        if validate_every and (step % validate_every == 0 or step == steps):
            line["validation_loss"] = 2.98 + 0.5 * math.exp(-step / 30) + 0.0004 * max(0, step - 90)
        lines.append(line)
    return lines


def samples() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Write a fable titled The Fox {ALERT}.",
            "reference": f"A fox came to a well.\n\nMoral: look twice. {BREAKOUT}",
            "before": f"The fox the fox {BREAKOUT}",
            "before_finish_reason": "length",
            "after": f"\nA fox came at dusk.\n\nMoral: {ALERT}",
            "after_finish_reason": "stop",
        },
        {
            "prompt": [
                {"role": "system", "content": "You tell fables."},
                {"role": "user", "content": f"讲一个寓言。{ALERT}"},
            ],
            "reference": None,
            "before": "",
            "before_finish_reason": "stop",
            "after": CHINESE,
            "after_finish_reason": "length",
        },
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Makes a run folder like that of a real run, hostile texts included, and its report."""

    def make(
        *,
        steps: int = 120,
        validate_every: int | None = 12,
        results: dict[str, Any] | None = RESULTS,
        data: dict[str, Any] | None = None,
        manifest: dict[str, Any] | None = None,
        written: list[dict[str, Any]] | None = None,
    ) -> RunFolder:
        folder = RunFolder(tmp_path / "fables-二")
        described: dict[str, Any] = {
            "files": {
                f"/data/{ALERT}/train.jsonl": "ab" * 32,
                f"/data/validation{BREAKOUT.replace('/', '')}.jsonl": "cd" * 32,
            },
            "shape": "prompt+completion",
            "prompt_format": "chat",
            "read": 352,
            "train": 320,
            "validation": 32 if results else 0,
            "train_tokens": 60000,
            "train_loss_tokens": 51000,
            "validation_loss_tokens": 5210,
            "length_median": 181,
            "length_max": 322,
            "length_histogram": {
                "counts": [4, 40, 120, 90, 50, 12, 4],
                "edges": [64.0, 101.0, 138.0, 175.0, 212.0, 249.0, 286.0, 322.0],
            },
            "max_length": 2048,
            "too_long": 0,
            "too_long_action": "refuse",
            "tokens_lost": 0,
        } | (data or {})
        whole: dict[str, Any] = {
            "data": described,
            "base": {"name": "smollm2-135m", "sha256": "ef" * 32, "parameters": 134515008},
            "seed": 7,
            "environment": {
                "python": "3.12.4",
                "versions": {"finespun": "0.1.0", "torch": "2.11.0", "transformers": "5.20.0", "peft": "0.21.0"},
                "system": "Linux-6.1-x86_64",
                "processor": "Example CPU @ 2.40GHz",
                "threads": 2,
                "gpus": [],
            },
        } | (manifest or {})
        if results:
            whole["results"] = results
        folder.create(Recipe.parse({"data": {"source": [f"/data/{ALERT}/train.jsonl"]}}), whole)
        for line in metrics(steps, validate_every):
            folder.append_metrics(line)
        folder.write_samples(samples() if written is None else written)
        write_report(folder)
        return folder

    return make


class Page(HTMLParser):
    """The elements of a page and its visible text, as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def read(folder: RunFolder) -> tuple[str, Page]:
    source = folder.report.read_text(encoding="utf-8")
    return source, Page(source)


def test_texts_cannot_inject(make_run: RunMaker) -> None:
    source, page = read(make_run())
    assert "alert(" in page.text
    assert ALERT not in source
    assert "<img" not in source
    assert [attributes.get("type") for tag, attributes in page.elements if tag == "script"] == [
        "application/json",
        None,
    ]
    assert not [
        name for _, attributes in page.elements for name in attributes if name.startswith("on") or name == "style"
    ]


def test_page_loads_nothing(make_run: RunMaker) -> None:
    source, page = read(make_run())
    loaded = [
        attributes[name] or ""
        for _, attributes in page.elements
        for name in ("src", "href", "data", "action")
        if name in attributes
    ]
    assert all(target.startswith("#") for target in loaded)
    assert not re.search(r"url\(|@import", source)
    policy = next(attributes["content"] or "" for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_figures(make_run: RunMaker) -> None:
    _, page = read(make_run())
    assert "Perplexity on unseen texts fell by 42 %" in page.text
    assert "−45 % to −39 %" in page.text
    assert "34.2" in page.text
    assert "18.0 to 21.9" in page.text
    assert "step 90" in page.text
    assert "51,000 (85 %)" in page.text
    assert "nothing was cut, left out or split" in page.text
    assert "sha256 abababababab" in page.text


def test_chart_columns(make_run: RunMaker) -> None:
    source, _ = read(make_run())
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', source, re.DOTALL)
    assert found
    columns = json.loads(found[1])["columns"]
    assert len({len(values) for values in columns.values()}) == 1
    assert columns["step"] == list(range(121))
    assert columns["validation_loss"][0] == pytest.approx(math.log(34.21), rel=1e-5)
    assert columns["loss"][:2] == [None, pytest.approx(metrics(1, None)[0]["loss"], rel=1e-5)]


def test_without_validation(make_run: RunMaker) -> None:
    _, page = read(make_run(results=None, validate_every=None))
    assert "No texts were held out" in page.text
    assert "fell by" not in page.text
    assert "as a table" not in page.text


def test_interval_that_includes_no_change(make_run: RunMaker) -> None:
    _, page = read(make_run(results=RESULTS | {"perplexity_ratio": interval(0.95, 0.88, 1.03)}))
    assert "No clear change" in page.text
    assert "−12 % to +3.0 %, includes no change" in page.text
    assert "fell by" not in page.text


def test_one_held_out_text(make_run: RunMaker) -> None:
    unbounded = {
        key: interval(value, 0.0, math.inf)
        for key, value in [("perplexity_before", 30.0), ("perplexity_after", 15.0), ("perplexity_ratio", 0.5)]
    }
    _, page = read(make_run(results={"best_step": 120} | unbounded, data={"validation": 1}))
    assert "50 % lower on the only held-out text" in page.text
    assert "no interval" in page.text
    assert "∞" not in page.text


def test_worse(make_run: RunMaker) -> None:
    _, page = read(make_run(results=RESULTS | {"perplexity_ratio": interval(1.25, 1.1, 1.4)}))
    assert "rose by 25 %" in page.text


def test_samples(make_run: RunMaker) -> None:
    _, page = read(make_run())
    assert CHINESE in page.text
    assert "You tell fables." in page.text
    assert "ended by itself" in page.text
    assert "cut at the longest length" in page.text
    assert page.text.count("Reference") == 1
    assert "fables-二" in page.text


def test_without_samples_and_with_start(make_run: RunMaker) -> None:
    _, page = read(make_run(written=[], manifest={"started": "2026-03-07T14:05:00+00:00"}))
    assert "No samples were asked for" in page.text
    assert "7 March 2026, 14:05" in page.text


SHARE_LOST = "1,200 tokens, 12 % of the training texts, were not trained."


@pytest.mark.parametrize(
    ("action", "many", "lost", "expected"),
    [
        ("cut", 3, 1200, f"3 training examples longer than 512 tokens were cut at the limit. {SHARE_LOST}"),
        ("cut-left", 3, 1200, f"3 training examples longer than 512 tokens were cut at their beginning. {SHARE_LOST}"),
        ("skip", 1, 1200, f"1 training example longer than 512 tokens was left out. {SHARE_LOST}"),
        ("split", 2, 0, "2 training examples longer than 512 tokens were split into several. No token was lost."),
    ],
)
def test_length_limit(action: str, many: int, lost: int, expected: str) -> None:
    data = {"max_length": 512, "too_long": many, "too_long_action": action, "tokens_lost": lost, "train_tokens": 8800}
    assert _length_limit(data) == expected


def test_formats() -> None:
    assert [percent(value) for value in (42.0, 4.7, 0.04, 0, 99.96, 100, 105, 2900)] == [
        "42 %",
        "4.7 %",
        "0.04 %",
        "0 %",
        "99.96 %",
        "100 %",
        "105 %",
        "2,900 %",
    ]
    assert [perplexity(value) for value in (3.14159, 31.416, 3141.59, math.inf)] == ["3.14", "31.4", "3,142", "∞"]
    assert [duration(value) for value in (2.34, 42, 200, 7500)] == ["2.3 s", "42 s", "3 min 20 s", "2 h 05 min"]
    assert count(12345.6) == "12,346"
    assert _change(interval(0.58, 0.55, 0.61))["value"] == "−42 %"


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts ran in Chromium, and what the browser logged."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    fixed = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr"
    )
    command = [
        chromium,
        *fixed.split(),
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("steps", "results"), [(5000, RESULTS), (1, None)], ids=["5000 steps", "1 step, no validation"]
)
def test_browser_draws_charts(make_run: RunMaker, tmp_path: Path, steps: int, results: dict[str, Any] | None) -> None:
    folder = make_run(steps=steps, results=results, validate_every=500 if results else None)
    dom, log = browse(folder.report, tmp_path / "profile", "--window-size=390,800")
    assert re.search(r'<html[^>]* data-charts="ready"', dom)
    assert dom.count("<canvas") == 3
    assert dom.count('class="u-legend') == 3
    assert ("validation</div>" in dom) == bool(results)
    # Script errors and anything that the page's own policy refused come as console messages.
    assert "CONSOLE" not in log, log


def test_metrics_during_training_are_drawn_and_tabled(make_run: RunMaker, tmp_path: Path) -> None:
    names = ["chrF++", f"own:{BREAKOUT}"]
    evaluation = {"every": 20, "examples": 64, "metrics": names, "best_by": "chrF++"}
    folder = make_run(results=RESULTS | {"best_by": "chrF++"}, manifest={"recipe": {"evaluation": evaluation}})
    last = folder.metrics()[-1]
    folder.append_metrics(last | {"step": 121, "chrF++": 31.25, names[1]: 7.5})
    folder.append_metrics(last | {"step": 122, "chrF++": 30.5})  # of a recipe that was changed on the way
    write_report(folder)
    source, page = read(folder)
    assert "the one with the best chrF++, of step 90 (dashed line), was kept" in page.text
    assert all(figure in page.text for figure in ("31.25", "7.5", "30.5", "–"))
    assert BREAKOUT not in source
    dom, log = browse(folder.report, tmp_path / "profile", "--window-size=390,800")
    assert dom.count("<canvas") == 5
    assert "CONSOLE" not in log, log


def test_the_page_of_a_check_is_drawn_and_texts_cannot_inject(tmp_path: Path) -> None:
    items = [{"prompt": f"{number} {BREAKOUT}", "completion": f"{ALERT} {number}"} for number in range(40)]
    recipe = DataRecipe(validation=0.1, on_bad_row="skip")
    check = check_texts(read_texts(recipe, [*items, {"prompt": ALERT, "completion": 5}, *items[:3]]))
    page = tmp_path / "check.html"
    write_check(check, page, f"data {BREAKOUT}", "m")
    source = page.read_text(encoding="utf-8")
    assert ALERT not in source
    assert "<img" not in source
    text = Page(source).text
    assert "Training would refuse this data as it is." in text
    assert "1 of 44 (2.3 %) rows that cannot be used" in text
    assert "data, row 41" in text
    dom, log = browse(page, tmp_path / "profile", "--window-size=390,800")
    assert dom.count("<rect") == len(check.lengths.counts)
    assert "CONSOLE" not in log, log
