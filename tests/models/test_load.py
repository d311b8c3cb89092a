from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file

import finespun
from finespun.errors import ModelError, ModelNotFound
from finespun.models import catalog
from finespun.models.catalog import KNOWN_MODELS, locate, package_file
from finespun.models.load import load_model, load_tokenizer, save_model

PACKAGE = KNOWN_MODELS["smollm2-135m"].package


def test_the_converted_weights_are_those_of_the_package(smollm2_folder: Path) -> None:
    """Against the gguf library's own dequantization, for tensors of each kind; llama.cpp stores queries and keys with
    the halves of each head interleaved."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(package_file(PACKAGE)).tensors}
    weights = load_file(smollm2_folder / "model.safetensors")

    def expected(name: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    names = {
        "token_embd": "model.embed_tokens",
        "blk.3.ffn_down": "model.layers.3.mlp.down_proj",
        "blk.29.attn_v": "model.layers.29.self_attn.v_proj",
    }
    for theirs, ours in names.items():
        assert torch.equal(weights[f"{ours}.weight"], expected(f"{theirs}.weight")), ours
    for theirs, ours, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)):
        interleaved = expected(f"blk.7.{theirs}.weight").view(heads, 32, 2, 576)
        assert torch.equal(
            weights[f"model.layers.7.self_attn.{ours}.weight"], interleaved.transpose(1, 2).reshape(heads * 64, 576)
        ), ours
    assert "lm_head.weight" not in weights


def test_a_name_is_looked_for_in_the_cache_then_the_package_then_the_hub(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate("smollm2-135m").path == smollm2_folder
    monkeypatch.setenv("FINESPUN_CACHE", str(tmp_path))
    assert locate("SmolLM2-135M").kind == "package"
    monkeypatch.setattr(catalog, "package_file", lambda package: None)
    asked: list[str] = []
    monkeypatch.setattr(catalog, "_on_hub", lambda hub_id, download: (asked.append(hub_id), (None, "away"))[1])
    with pytest.raises(ModelNotFound):
        locate("smollm2-135m")
    with pytest.raises(ModelNotFound, match="away"):
        locate("gpt2")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai-community/gpt2"]


@pytest.mark.slow  # reading a GGUF's vocabulary in Python takes half a minute
def test_a_gguf_file_by_its_path_is_the_same_model(smollm2_shared, tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.symlink_to(package_file(PACKAGE))
    loaded = load_model(str(path), "float32", torch.device("cpu"))
    ids = smollm2_shared.tokenizer("A heron fished below the mill", return_tensors="pt").input_ids
    assert torch.equal(loaded.tokenizer("A heron fished below the mill", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, smollm2_shared.model(ids).logits)


def test_a_package_that_is_not_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("FINESPUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "package_file", lambda package: tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="Install it anew"):
        load_model("smollm2-135m")
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_was_converted_in_an_older_way_is_made_anew(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "models" / "smollm2-135m"
    copy.mkdir(parents=True)
    for file in smollm2_folder.iterdir():
        (copy / file.name).symlink_to(file)
    monkeypatch.setenv("FINESPUN_CACHE", str(tmp_path))
    assert locate("smollm2-135m").path == copy
    origin = json.loads((copy / "finespun.json").read_text())
    (copy / "finespun.json").unlink()
    (copy / "finespun.json").write_text(json.dumps({key: origin[key] for key in origin if key != "conversion"}))
    assert locate("smollm2-135m").kind == "package"
    (copy / "finespun.json").unlink()
    assert locate("smollm2-135m").kind == "package"


def test_a_damaged_converted_copy_is_refused(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "models" / "smollm2-135m"
    shutil.copytree(smollm2_folder, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"\xff\x00\xff")
    monkeypatch.setenv("FINESPUN_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="damaged"):
        load_model("smollm2-135m")


def test_an_adapter_on_other_weights_than_its_own_is_refused(tiny_folder: Path, in_tmp: Path) -> None:
    shutil.copytree(tiny_folder, "base")
    run = (
        finespun.load("base").finetune(["the old ferryman", "a slow river"], method="lora", max_steps=1, quiet=True).run
    )
    other = load_model("base")
    with torch.no_grad():
        other.model.get_input_embeddings().weight += 1
    other.model.save_pretrained("base")
    with pytest.raises(ModelError, match="trained on other weights"):
        finespun.load(run.path)


def test_a_tokenizer_without_its_weights_is_that_of_the_model(tiny_folder: Path, in_tmp: Path) -> None:
    """Also beside an adapter, where the context is that of the model below it."""
    model = finespun.load(tiny_folder)
    model.finetune(["the old ferryman"] * 4 + ["rowed over"], method="lora", max_steps=1, out="lora", quiet=True)
    for name in (str(tiny_folder), "lora"):
        tokenizer, context = load_tokenizer(name)
        loaded = load_model(name, "float32", torch.device("cpu"))
        assert context == loaded.context_length == 128
        assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
        assert tokenizer.chat_template == loaded.tokenizer.chat_template
    with pytest.raises(ModelNotFound):
        load_tokenizer("no-such-model-anywhere")


def test_a_saved_model_stops_where_ours_does_and_says_in_which_precision_it_was_trained(tiny, tmp_path: Path) -> None:
    save_model(tiny, [7, 1], tmp_path / "saved")
    config = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert config["eos_token_id"] == [7, 1]
    assert json.loads((tmp_path / "saved/finespun.json").read_text()) == {"precision": "float32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_folder_that_is_no_model(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelError, match=r"neither config\.json nor"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))
