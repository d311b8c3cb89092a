"""New tokens, with an adapter beside frozen weights and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import finespun
from conftest import sentences


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_tokens_of_chatml_are_learned_saved_and_loaded(
    gpt2_folder: Path, tmp_path: Path, in_tmp: Path, tied: bool, method: str
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    base = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"prompt": text, "completion": text[::-1]} for text in sentences(12)]
    options = {"method": method, "chat_template": "chatml", "max_steps": 3, "learning_rate": 1e-2, "validation": 0.2}
    model = finespun.finetune(model=str(base), data=rows, out="run", quiet=True, **options)
    loaded = model._loaded
    new = loaded.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [len(tokenizer), len(tokenizer) + 1]
    assert model.encoder.stop_ids[0] == new[1]
    ids = torch.tensor([model.encoder.encode_prompt("the old ferryman")])
    assert set(new) <= set(ids[0].tolist())
    with torch.no_grad():
        trained = loaded.model(input_ids=ids).logits.float()
        again = finespun.load("run")
        assert torch.allclose(again._loaded.model(input_ids=ids).logits.float(), trained, atol=1e-5)
        again.save("merged", merge_adapter=True)
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
        assert torch.allclose(merged(input_ids=ids).logits, trained, atol=1e-4)
    if method == "lora":
        assert sum(file.stat().st_size for file in Path("run/model").glob("*.safetensors")) < 1e6, (
            "not the whole matrix"
        )
        (weights,) = [
            parameter
            for name, parameter in loaded.model.named_parameters()
            if "trainable_tokens" in name and "embed" in name
        ]
        embedding = AutoModelForCausalLM.from_pretrained("merged").get_input_embeddings().weight
        assert torch.allclose(embedding[new], weights.float(), atol=1e-5)
        untouched = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
        assert torch.equal(embedding[: len(tokenizer)], untouched), "only the new tokens' rows are trained"
