"""The scales of a rating: a question, and a description for each mark from worst to best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic.dataclasses import dataclass

from finespun.errors import RecipeError
from finespun.recipe import nearest

Words = dict[str, str]
"""The same words by language: `en` always, others where they are known."""

FEWEST_POINTS, MOST_POINTS = 2, 9  # a mark is one key


@dataclass(frozen=True)
class Criterion:
    """One scale. A mark is the number of a point, from 1."""

    name: str
    title: Words
    question: Words
    points: tuple[Words, ...]


def _own_scale(name: str, title: str, question: tuple[str, str], points: Sequence[tuple[str, str]]) -> Criterion:
    worded = tuple({"en": english, "zh": chinese} for english, chinese in points)
    return Criterion(name, {"en": name.capitalize(), "zh": title}, {"en": question[0], "zh": question[1]}, worded)


KNOWN = {
    criterion.name: criterion
    for criterion in (
        _own_scale(
            "fluency",
            "流畅度",
            ("Is it well-formed, natural language?", "语言是否规范、自然？"),
            [
                ("Cannot be understood", "无法理解"),
                ("Many mistakes, hard to read", "错误很多，难以阅读"),
                ("Some mistakes, can be read", "有一些错误，可以阅读"),
                ("Few small mistakes", "只有少量小错误"),
                ("Flawless and natural", "完全正确，自然流畅"),
            ],
        ),
        _own_scale(
            "adequacy",
            "切题度",
            ("Does it do what the prompt asks for, rightly and completely?", "是否正确、完整地完成了提示的要求？"),
            [
                ("Nothing of it", "完全没有"),
                ("Little of it, or much is wrong", "只完成一小部分，或错误很多"),
                ("About half", "大约一半"),
                ("Most of it", "大部分"),
                ("All of it, nothing wrong", "全部完成，没有错误"),
            ],
        ),
        _own_scale(
            "coherence",
            "连贯性",
            ("Do its parts fit together?", "各部分是否前后连贯？"),
            [
                ("No connection at all", "毫无联系"),
                ("Falls apart in many places", "多处脱节"),
                ("Holds together in parts", "部分连贯"),
                ("Holds together but for details", "基本连贯，个别细节除外"),
                ("Holds together throughout", "通篇连贯"),
            ],
        ),
        _own_scale(
            "style",
            "文风",
            ("Is it written as such a text should be?", "写法是否符合这类文本应有的风格？"),
            [
                ("Wholly out of place", "完全不合适"),
                ("Mostly out of place", "大多不合适"),
                ("Acceptable", "可以接受"),
                ("Good", "好"),
                ("Excellent", "非常好"),
            ],
        ),
    )
}


def find_criteria(names: Sequence[str], file: Path | None) -> tuple[Criterion, ...]:
    """The criteria called `names`, where those in `file` go before finespun's; all in the file, or finespun's four,
    where no names are given. Raises `RecipeError` for what is not known."""
    own = _read_criteria(file) if file else {}
    known = KNOWN | own
    if len(set(names)) < len(names):
        raise RecipeError("criteria: each can be named once only.")
    for name in names:
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean {guess}?" if guess else f"known are {', '.join(known)}."
            raise RecipeError(f"criteria: {name} is not known; {hint}")
    return tuple(known[name] for name in names or own or KNOWN)


def _read_criteria(file: Path) -> dict[str, Criterion]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: the criteria cannot be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"{file}: should have a criterion's name as each key, with `question` and `points` below it.")
    return {str(name): _read_criterion(file, str(name), told) for name, told in content.items()}


def _read_criterion(file: Path, name: str, told: Any) -> Criterion:
    where = f"{file}: {name}"
    if not isinstance(told, dict) or set(told) != {"question", "points"} or not isinstance(told["question"], str):
        raise RecipeError(f"{where}: should have a `question` and `points`, nothing else.")
    points = told["points"]
    if (
        not isinstance(points, list)
        or not FEWEST_POINTS <= len(points) <= MOST_POINTS
        or not all(isinstance(point, str | int) for point in points)
    ):
        raise RecipeError(
            f"{where}: `points` should be a list of {FEWEST_POINTS} to {MOST_POINTS} descriptions, from worst to best."
        )
    return Criterion(name, {"en": name}, {"en": told["question"]}, tuple({"en": str(point)} for point in points))
