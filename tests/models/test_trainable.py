"""What each method trains, saves and loads: in finespun, and in plain peft and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import finespun
from conftest import sentences
from finespun.errors import ModelError, RecipeError
from finespun.models.load import LoadedModel, load_model
from finespun.models.trainable import freeze, make_trainable
from finespun.recipe import Recipe
from finespun.runs import RunFolder

ROWS = [{"prompt": text, "completion": text[::-1]} for text in sentences(12)]

ADAPTERS = {
    "lora": {"method": "lora"},
    # methods with larger steps, which at the others' rate learn to write no words
    "rslora": {"method": "lora", "learning_rate": 0.005, "lora": {"rank_stabilized": True, "rank": 4}},
    "lora+": {"method": "lora", "learning_rate": 0.005, "lora": {"b_rate_ratio": 16.0}},
    "dora": {"method": "lora", "lora": {"dora": True}},
    "pissa": {"method": "lora", "lora": {"initial": "pissa", "rank": 4}},
    "pissa, rslora": {"method": "lora", "lora": {"initial": "pissa", "rank_stabilized": True, "rank": 4}},
    "lora and a head": {"method": "lora", "lora": {"trained_modules": ["lm_head"]}},
    "lora by name": {"method": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}},
    "qlora": {"method": "qlora"},
    "prompt": {"method": "prompt-tuning", "soft_prompt": {"virtual_tokens": 5}},
    "prompt from a text": {"method": "prompt-tuning", "soft_prompt": {"initial_text": "the old ferryman"}},
    "prefix": {"method": "prefix-tuning", "soft_prompt": {"virtual_tokens": 5}},
}


def ids_of(model: finespun.TextModel, text: str = "the old ferryman") -> torch.Tensor:
    return torch.tensor([model.encoder.encode_prompt(text)])


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trained_adapter_says_the_same_in_memory_loaded_and_in_plain_peft(
    name: str, tiny_folder: Path, in_tmp: Path
) -> None:
    untrained = finespun.load(tiny_folder).generate(["the old ferryman"], max_new_tokens=12)
    settings = {"learning_rate": 0.3 if "prompt" in name or name == "prefix" else 0.02, **ADAPTERS[name]}
    model = finespun.load(tiny_folder).finetune(
        ROWS, max_steps=24, batch_size=4, quiet=True, count=0, out="run", **settings
    )
    prompts = ["the old ferryman", "nothing at all, heron"]
    written = model.generate(prompts, max_new_tokens=12)
    assert written[:1] != untrained, "it must have learned something for this to show anything"
    assert [model.generate(prompt, max_new_tokens=12) for prompt in prompts] == written, "alone and in a batch"
    assert finespun.load("run").generate(prompts, max_new_tokens=12) == written, "loaded"
    size = sum(file.stat().st_size for file in Path("run/model").glob("*.safetensors"))
    assert size < 0.9 * (tiny_folder / "model.safetensors").stat().st_size or name == "lora and a head"
    if name == "qlora":
        return  # peft alone would not know that the base was in 4 bits
    plain = AutoPeftModelForCausalLM.from_pretrained("run/model", dtype=torch.float32).eval()
    ids = ids_of(model)
    output = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert written[0].strip()
    decoded = AutoTokenizer.from_pretrained("run/model").decode(output[0], skip_special_tokens=True)
    assert decoded.endswith(written[0]), "with the prompt before it or, for a soft prompt, without"


@pytest.mark.parametrize("name", [name for name in ADAPTERS if not name.startswith("pre") and "prompt" not in name])
def test_merged_into_the_weights_it_says_the_same(name: str, tiny_folder: Path, in_tmp: Path) -> None:
    settings = {"learning_rate": 0.02, **ADAPTERS[name]}
    model = finespun.load(tiny_folder).finetune(
        ROWS, max_steps=8, batch_size=4, quiet=True, count=0, out="run", **settings
    )
    ids = ids_of(model)
    with torch.no_grad():
        expected = model._loaded.model(input_ids=ids).logits
    model.save("merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "qlora", "prompt", "prefix", "lora and a head"])
def test_an_adapter_is_trained_on_from_its_run(name: str, tiny_folder: Path, in_tmp: Path) -> None:
    options = {"max_steps": 6, "learning_rate": 0.01, "batch_size": 4, "quiet": True, "validation": 0.2, "epochs": 9}
    finespun.finetune(data=ROWS, model=str(tiny_folder), out="first", **options, **ADAPTERS[name])
    second = finespun.finetune(data=ROWS, model="first", out="second", **options, method=ADAPTERS[name]["method"])
    first, again = (RunFolder(Path(run)).manifest()["results"] for run in ("first", "second"))
    assert again["perplexity_before"]["value"] == pytest.approx(first["perplexity_after"]["value"], rel=1e-3)
    assert again["perplexity_after"]["value"] < first["perplexity_after"]["value"]
    assert second._loaded.has_adapter
    assert finespun.load("second").generate("the old", max_new_tokens=9) == second.generate("the old", max_new_tokens=9)


def test_pissa_starts_as_the_model_and_leaves_the_weights_of_the_base_as_they_were(tiny: LoadedModel) -> None:
    ids = torch.arange(9)[None]
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    with torch.no_grad():
        expected = tiny.model(input_ids=ids).logits
        make_trainable(tiny, Recipe.from_keywords(method="lora", lora={"initial": "pissa", "rank": 4}))
        torch.testing.assert_close(tiny.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert any("lora_B" in name and value.abs().max() > 0 for name, value in tiny.model.named_parameters())
        base = finespun.models.adapters.unroll_pissa(
            tiny.model, tiny.pissa_start, Recipe().lora.model_copy(update={"rank": 4})
        )
        torch.testing.assert_close(base(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    for name, value in base.unload().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_qlora_keeps_the_base_in_four_bits_and_trains_beside_it(tiny_folder: Path, in_tmp: Path) -> None:
    model = finespun.load(tiny_folder).finetune(ROWS, max_steps=2, quiet=True, out="run", method="qlora")
    kinds = {type(module).__name__ for module in model._loaded.causal_lm.modules()}
    assert "Linear4bit" in kinds
    assert any("Linear4bit" in type(m).__name__ for m in finespun.load("run")._loaded.causal_lm.modules())


def test_a_soft_prompt_cannot_be_merged(tiny_folder: Path, in_tmp: Path) -> None:
    model = finespun.load(tiny_folder).finetune(ROWS, max_steps=2, quiet=True, out="run", method="prompt-tuning")
    with pytest.raises(ModelError, match="soft prompt"):
        model.save("merged", merge_adapter=True)


def test_the_soft_prompt_takes_its_part_of_the_context(tiny_folder: Path, in_tmp: Path) -> None:
    model = finespun.load(tiny_folder).finetune(ROWS, max_steps=2, quiet=True, out="run", method="prefix-tuning")
    assert model._loaded.context_length == 128 - 20
    (completion,) = model.complete(["the old ferryman"], max_new_tokens=500)[0]
    assert completion.prompt_tokens + completion.completion_tokens <= 108


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        (["embeddings"], ["embed_tokens"]),
        (["first-1"], ["layers.0."]),
        (["*.mlp.*"], [".mlp."]),
        (["first-1", "*.input_layernorm.*"], ["layers.0.", "input_layernorm"]),
    ],
)
def test_frozen_parts_stay_as_they_are_and_the_rest_learns(
    tiny_folder: Path, in_tmp: Path, what: list[str], frozen: list[str]
) -> None:
    before = finespun.load(tiny_folder)._loaded.model.state_dict()
    model = finespun.load(tiny_folder).finetune(
        ROWS, max_steps=3, learning_rate=0.01, quiet=True, freeze=what, out="run", optimizer="muon"
    )
    for name, value in model._loaded.model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == any(part in name for part in frozen) or "lm_head" in name, name


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["first-9"], "the model has 2 layers"),
        (["*.attn.c_proj.*"], r"matches no parameter.*model\."),
        (["*"], "nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(tiny: LoadedModel, what: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        freeze(tiny.model, what)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "lora", "freeze": ["embeddings"]}, "method full"),
        ({"method": "lora", "lora": {"dora": True, "initial": "pissa"}}, "choose one"),
        ({"method": "prefix-tuning", "gradient_checkpointing": "full"}, "leave it off"),
        ({"optimizer": "schedule-free-adamw", "schedule": "cosine"}, "leave `schedule` out"),
        ({"optimizer": "schedule-free-adamw", "ema_decay": 0.9}, "leave `ema_decay` out"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(keywords: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_keywords(**keywords)


def test_another_kind_of_adapter_beside_the_first_is_refused(tiny_folder: Path, in_tmp: Path) -> None:
    finespun.finetune(data=ROWS, model=str(tiny_folder), max_steps=1, quiet=True, out="first", method="lora")
    with pytest.raises(RecipeError, match=r"adapter of kind LORA.*prompt-tuning.*merge_adapter"):
        finespun.finetune(data=ROWS, model="first", max_steps=1, quiet=True, out="second", method="prompt-tuning")
    assert not Path("second").exists()


def test_a_gguf_file_is_not_taken_for_qlora_instead_of_training_it_whole(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"not of a \.gguf file"):
        load_model(str(tmp_path / "model.gguf"), four_bits=True)
