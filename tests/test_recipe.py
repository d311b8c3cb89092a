"""The recipe says the same in YAML, as options and as Python keywords."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finespun.cli import main
from finespun.errors import RecipeError
from finespun.recipe import SECTIONS, Recipe


def test_yaml_options_and_keywords_are_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Recipe] = []

    def stop(recipe: Recipe, reporter: object) -> None:
        taken.append(recipe)
        raise SystemExit

    monkeypatch.setattr("finespun.finetuning.finetune", stop)
    (tmp_path / "recipe.yaml").write_text(
        "model: m\ndata: a.txt\ntraining: {epochs: 2, method: lora}\nlora: {rank: 4}\n"
        "evaluation: {every: 9, metrics: [BLEU, own:score], best_by: BLEU}\n"
    )
    flags = ["--training.epochs", "2", "--training.method", "lora", "--lora.rank", "4"]
    flags += ["--evaluation.every", "9", "--evaluation.metrics", "bleu,own:score", "--evaluation.best-by", "bleu"]
    for command in (
        ["train", str(tmp_path / "recipe.yaml")],
        ["train", "--model", "m", "--data", "a.txt", *flags],
        ["train", str(tmp_path / "recipe.yaml"), "--data=a.txt"],
    ):
        with pytest.raises(SystemExit):
            main(command)
    evaluation = {"every": 9, "metrics": ["BLEU", "own:score"], "best_by": "BLEU"}
    from_python = Recipe.from_keywords(
        model="m", data="a.txt", epochs=2, training={"method": "lora"}, rank=4, **evaluation
    )
    assert taken == [from_python] * 3


def test_paths_may_be_path_objects() -> None:
    data = {"source": [Path("a.txt")], "validation": [Path("b.txt")]}
    written = Recipe.from_keywords(model=Path("m"), out=Path("runs/x"), data=data)
    plain = Recipe.from_keywords(
        model="m", out=str(Path("runs/x")), data={"source": ["a.txt"], "validation": ["b.txt"]}
    )
    assert written == plain


def test_an_option_overrides_one_key_of_the_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {source: [a.txt], max_length: 64}\ntraining: {epochs: 2, seed: 7}\n")
    recipe = Recipe.load(path, {"training": {"epochs": 5}, "data": {"too_long": "cut"}})
    assert (recipe.training.epochs, recipe.training.seed) == (5, 7)
    assert (recipe.data.source, recipe.data.max_length, recipe.data.too_long) == (["a.txt"], 64, "cut")


@example(epochs=1.0, rate=None, source=["a"], template={"prompt": "a\x85b", "completion": "\x85"})
@settings(deadline=None)
@given(
    epochs=st.floats(0.01, 1e4),
    rate=st.none() | st.floats(1e-9, 10),
    source=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1),
    template=st.none() | st.fixed_dictionaries({"prompt": st.text(), "completion": st.text()}),
)
def test_a_stored_recipe_reads_back_as_it_was(
    epochs: float, rate: float | None, source: list[str], template: dict | None
) -> None:
    recipe = Recipe.from_keywords(epochs=epochs, learning_rate=rate, data={"source": source, "template": template})
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_bare_field_names_are_unambiguous() -> None:
    fields = [field for section in SECTIONS.values() for field in section.model_fields]
    assert len(fields) == len(set(fields))
    assert not set(fields) & set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"epoks": 2}, "did you mean `training.epochs`?"),
        ({"training": {"learning_rat": 1}}, "did you mean `training.learning_rate`?"),
        ({"modle": "x"}, "did you mean `model`?"),
        ({"training": {"method": "lroa"}}, "should be 'full', 'lora', 'qlora', "),
        ({"data": {"template": {"prompt": "x"}}}, "either prompt and completion, or text"),
        ({"data": {"validation": 1.5}}, "`data.validation`"),
        ({"epochs": float("inf")}, "`training.epochs`"),
        ({"every": 5, "metrics": ["BLUE"]}, "no metric 'BLUE'; there are BLEU, chrF++, "),
        ({"every": 5, "metrics": ["MAUVE"]}, "MAUVE:MODEL, and your own as module:function"),
        ({"every": 5, "metrics": ["BLEU"], "best_by": "TER"}, "`best_by` TER is not one of the `metrics`"),
        ({"every": 5, "best_by": "loss"}, "`evaluation.best_by` there is no metric 'loss'"),
        ({"metrics": ["BLEU"]}, "say how many, with `every`"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_recipe(keywords: dict, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_keywords(**keywords)
    assert said in str(error.value)
    assert "pydantic" not in str(error.value)
