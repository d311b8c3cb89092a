"""The Python session of the README, as written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import finespun

TEXTS = [
    f"Once upon a time a {who} walked {where} and found {what}."
    for who in ("heron", "miller")
    for where in ("home", "far")
    for what in ("a net", "rain")
]
README = Path(__file__).parents[1] / "README.md"


def session(model_name: str) -> str:
    """The README's session with another model and less to do."""
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
        if "my-writer" in block
    )
    assert 'finespun.load("gpt2")' in code
    assert "max_new_tokens=100" in code
    return (
        code.replace('load("gpt2")', f"load({model_name!r})")
        .replace("max_new_tokens=100", "max_new_tokens=12")
        .replace("epochs=3", "epochs=1, max_new_tokens=12, micro_batch_tokens=512, save_every=99")
    )


@pytest.mark.parametrize("which", ["gpt2_folder", "smollm2_folder"])
def test_the_session_works_as_written(
    which: str, request: pytest.FixtureRequest, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(which)
    name = "smollm2-135m" if which == "smollm2_folder" else str(request.getfixturevalue("gpt2_folder"))
    scope: dict = {"texts": TEXTS}
    exec(session(name), scope)
    written = capsys.readouterr().out.rstrip("\n")
    assert written == finespun.load("my-writer").generate("Once upon a time", max_new_tokens=12)
    assert scope["model"].run.report.is_file()
