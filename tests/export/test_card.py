from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import finespun
from conftest import sentences
from finespun.errors import RunError
from finespun.export.card import hub_id, model_card
from finespun.models.catalog import KNOWN_MODELS
from finespun.runs import RunFolder


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run whose texts try to end the blocks that they are shown in."""
    home = tmp_path_factory.mktemp("card")
    rows = [{"prompt": f"```\n# {text}", "completion": text[::-1]} for text in sentences(20)]
    data = home / "secret folder" / "pairs.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"max_steps": 2, "validation": 0.2, "method": "lora", "samples": {"count": 2, "max_new_tokens": 4}}
    finespun.finetune(model=str(tiny_folder), data=str(data), out=str(home / "writer"), quiet=True, **options)
    return RunFolder(home / "writer")


def test_a_card_says_what_the_run_was_made_of_and_what_came_out(run: RunFolder) -> None:
    card = ModelCard(model_card(run, "peft"))
    manifest = run.manifest()
    data = run.path.parent / "secret folder" / "pairs.jsonl"
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    assert card.data.training_data == [{"file": "pairs.jsonl", "sha256": sha256}]
    assert card.data.library_name == "peft"
    assert card.data.tags == ["finespun", "lora"]
    assert card.data.base_model is None, "a folder on this machine is no name on the hub"
    assert card.text.lstrip().startswith("# writer\n")
    assert f"| `pairs.jsonl` | `{sha256}` |" in card.text
    for what in ("before", "after", "ratio"):
        value = manifest["results"][f"perplexity_{what}"]
        assert f"| {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} |" in card.text
    assert f"On {manifest['data']['validation']} held-out examples" in card.text
    for sample in run.samples():
        assert f"````\n{sample['prompt'].strip()}\n````" in card.text
        assert sample["after"].strip() in card.text


def test_a_card_has_the_recipe_and_no_path_of_this_machine(run: RunFolder, tiny_folder: Path) -> None:
    text = model_card(run, "peft")
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert recipe["training"]["method"] == "lora"
    assert recipe["data"]["source"] == ["pairs.jsonl"]
    assert recipe["model"] == "tiny"
    for path in (run.path.parent, tiny_folder.parent, Path.home()):
        assert str(path) not in text


def altered(run: RunFolder, folder: Path, **base: str) -> RunFolder:
    copy = RunFolder(folder)
    manifest = run.manifest() | {"base": run.manifest()["base"] | base}
    copy.create(run.recipe(), manifest)
    return copy


def test_the_base_is_the_model_that_the_first_run_began_with(run: RunFolder, tmp_path: Path) -> None:
    """Also of a run that went on from another one."""
    first = altered(run, tmp_path / "first", name="smollm2-135m")
    second = altered(run, tmp_path / "second", name=str(first.path))
    for each in (first, second):
        card = ModelCard(model_card(each, "transformers"))
        assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert card.data.license == "apache-2.0"
    unknown = ModelCard(model_card(altered(run, tmp_path / "other", name="someone/model"), "transformers"))
    assert unknown.data.base_model == "someone/model"
    assert unknown.data.license is None
    assert "look it up" in unknown.text


def test_a_gguf_has_its_tag_and_a_data_set_of_the_hub_its_name(run: RunFolder, tmp_path: Path) -> None:
    copy = altered(run, tmp_path / "copy")
    recipe = run.recipe()
    recipe.data.source = ["hf:owner/fables[en]:train", "letters.txt"]
    copy.create(recipe, copy.manifest())
    card = ModelCard(model_card(copy, None))
    assert card.data.tags == ["finespun", "lora", "gguf"]
    assert card.data.library_name is None
    assert card.data.datasets == ["owner/fables"]
    assert "hf:owner/fables[en]:train" in card.text


def test_where_nothing_was_held_out_nothing_is_claimed(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "copy")
    copy.create(run.recipe(), {key: value for key, value in run.manifest().items() if key != "results"})
    text = model_card(copy, "peft")
    assert "No text was held out" in text
    assert "perplexity" not in text
    assert "## Examples" not in text


def test_a_folder_without_a_run_has_no_card(tiny_folder: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        model_card(RunFolder(tiny_folder), "transformers")


def test_the_licence_of_each_known_model_is_known() -> None:
    assert all(known.licence == known.licence.lower().strip() != "" for known in KNOWN_MODELS.values())


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert hub_id("GPT2") == "openai-community/gpt2"
    assert hub_id("owner/model") == "owner/model"
    assert [hub_id(name) for name in ("runs/first", "/a/b", "model", "a/b/c")] == [None] * 4
