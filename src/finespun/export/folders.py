"""A run, or any model → a folder for another program, whole or not at all, and if asked for a copy of it on the hub.

Everything is computed in float32 on the CPU, so that an export does not depend on the machine that makes it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finespun.data.templates import Encoder
from finespun.errors import ModelError, RunError
from finespun.export import ollama, vllm
from finespun.export.card import hub_id_of, model_card
from finespun.export.settings import WITH_TYPE, ExportSettings, StoredPrecision, Target
from finespun.files import new_folder, write_text
from finespun.models.adapters import merge
from finespun.models.catalog import KNOWN_MODELS, ORIGIN_FILE, locate
from finespun.models.load import LoadedModel, compute_in, load_model, read_origin, save_model
from finespun.runs import RunFolder

PROBE = "The lighthouse keeper wrote: 一 42 naïve.\n"
"""What a model is asked before and after its adapter is folded in."""

MERGED_LOGITS_TOLERANCE = 1e-4
"""How far logits may move in that, relative to the largest; of SmolLM2 they move by 3e-6 in float32."""


def export(name: str, settings: ExportSettings) -> list[str]:
    """Writes the run or model called `name` as `settings` say; returns lines for a person: where it is, what to know,
    what to do next. Raises `RunError` for a folder that is taken or cannot be written, `ModelError` for what the target
    cannot hold, and what `load_model` raises."""
    out = settings.out or _default_out(name, settings.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is there already and is not empty. Choose another --out.")
    if settings.push:
        check_push(settings.push)
    run = RunFolder(Path(name).expanduser())
    called = run.path.absolute().name
    path = run.path if settings.to == "card" else locate(name).path
    card = _card(run, settings.to)
    lines = []
    with _no_empty_folders(out), new_folder(out) as new:
        if settings.to == "adapter":
            lines = write_adapter(name, path, new)
        elif settings.to != "card":
            lines = _write_weights(name, path, called, settings, new)
        if card:
            write_text(new / "README.md", card)
    return [*lines, f"Written to {out}", *_next_step(settings, called, out), *_pushed(out, settings.push)]


def write_adapter(name: str, path: Path, folder: Path) -> list[str]:
    """The adapter of the model `name`, which lies in `path`, as a PEFT folder that names its base as the hub does;
    returns what to know about it. Raises `ModelError` where there is none, or its base is not the one it goes with."""
    config_file = path / "adapter_config.json"
    if not config_file.is_file():
        raise ModelError(f"{name}: has no adapter; all of its weights were trained. Use --to hf.")
    loaded = load_model(name, "float32", torch.device("cpu"))  # which checks the base
    hub_name = hub_id_of(loaded)
    _copy_adapter(path, folder, hub_name or str(loaded.base_path.absolute()))
    if hub_name is None:
        return [f"Its base is only on this machine ({loaded.base_path}); use --to merged for others."]
    if source := read_origin(loaded.base_path).get("from"):
        return [
            f"It was trained on the weights of {source}, which are those of {hub_name} in fewer bits. finespun finds "
            "them; other programs write slightly other texts with the hub's. Use --to merged for these."
        ]
    return []


@torch.no_grad()
def fold_in_adapter(loaded: LoadedModel, encoder: Encoder) -> None:
    """Folds the adapter of `loaded`, if it has one, into its weights. Raises `ModelError` where the model then says
    something else: an adapter on one of two layers that share their weights cannot be folded into them."""
    if not loaded.has_adapter:
        return
    ids = torch.tensor([encoder.encode_prompt(PROBE)[-loaded.context_length :]], device=loaded.device)
    before = loaded.causal_lm(input_ids=ids).logits
    loaded.model = merge(loaded.model)
    after = loaded.model(input_ids=ids).logits
    if (after - before).abs().max() > MERGED_LOGITS_TOLERANCE * before.abs().max():
        raise ModelError(
            "With the adapter folded into its weights this model would write something else, since a layer that the "
            "adapter changes shares its weights with one that it does not. Use --to adapter."
        )


def store_in(model: Any, precision: StoredPrecision) -> None:
    """Converts the weights of `model` to `precision`, in place. Raises `ModelError` for what float16 cannot hold."""
    dtype: torch.dtype = getattr(torch, precision)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.abs().max() > torch.finfo(dtype).max:
            raise ModelError(f"{name} has weights too large for {precision}. Use --precision bfloat16.")
    compute_in(model, dtype)


def check_push(repository: str) -> None:
    """Raises `RunError` for what can be known to fail before anything is written."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RunError(f"--push {repository}: is not a name that the hub could have (OWNER/NAME): {error}") from None
    if get_token() is None:
        raise RunError(f"--push {repository}: you are not logged in to the hub. Log in: hf auth login")


def push(folder: Path, repository: str) -> str:
    """Uploads `folder`; returns the address of the repository, which is made private if it is not there. Raises
    `RunError` where the hub does not take it."""
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export from finespun")
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors are one of these
        raise RunError(
            f"{repository}: could not be uploaded: {error}\nThe export itself is complete in {folder}; upload it with: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(address)


def _write_weights(name: str, path: Path, called: str, settings: ExportSettings, new: Path) -> list[str]:
    """All of the weights of the model `name`, which lies in `path`, in the form that `settings.to` names."""
    adapter = path / "adapter_config.json"
    if settings.to == "hf" and adapter.is_file():
        raise ModelError(f"{name}: has an adapter. Use --to merged for all weights in one folder, or --to adapter.")
    if settings.to == "merged" and not adapter.is_file():
        raise ModelError(f"{name}: has no adapter to merge. Use --to hf.")
    loaded = load_model(name, "float32", torch.device("cpu"))
    encoder = Encoder(loaded.tokenizer)
    fold_in_adapter(loaded, encoder)
    if settings.to == "gguf":
        from finespun.export.gguf import write_gguf

        write_gguf(loaded, new / "model.gguf", settings.gguf_type or "f16", encoder.stop_ids)
        return []
    if settings.to == "ollama":
        return ollama.write_modelfile(loaded, encoder, new, settings.gguf_type or "f16")
    precision = settings.precision or ("float32" if settings.to == "merged" else _stored_in(path))
    store_in(loaded.model, precision)
    if settings.to == "vllm":
        save_model(loaded, encoder.stop_ids, new / "model")
        _write_serving(loaded, path, called, precision, new)
    else:
        save_model(loaded, encoder.stop_ids, new)
    return []


def _write_serving(loaded: LoadedModel, path: Path, called: str, precision: StoredPrecision, new: Path) -> None:
    """The script that serves `new/model`, with the command for the adapter in `path` where vLLM can serve that."""
    config = path / "adapter_config.json"
    commands = [vllm.serve_command(called, new / "model", "./model", loaded.context_length, precision)]
    if config.is_file() and (rank := vllm.adapter_rank(json.loads(config.read_text(encoding="utf-8")))):
        local, hub_name = str(loaded.base_path.absolute()), hub_id_of(loaded)
        _copy_adapter(path, new / "adapter", hub_name or local)
        same_on_hub = None if read_origin(loaded.base_path).get("from") else hub_name
        beside = vllm.Adapter(same_on_hub or local, "./adapter", rank)
        in_16_bits = "bfloat16" if precision == "float32" else precision  # vLLM's kernels for adapters know no others
        commands += [vllm.serve_command(called, new / "model", "./model", loaded.context_length, in_16_bits, beside)]
    vllm.write_script(new / "serve.sh", *commands)


def _copy_adapter(path: Path, folder: Path, base: str) -> None:
    """Copies the adapter in `path`, with `base` as the name of its base for others; for finespun, the short name of a
    known one, under which its very weights are found."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    ours = next((name for name, known in KNOWN_MODELS.items() if known.hub_id == base), base)
    for file, key, name in (
        (folder / "adapter_config.json", "base_model_name_or_path", base),
        (folder / ORIGIN_FILE, "base_name", ours),
    ):
        if file.is_file():
            said = json.loads(file.read_text(encoding="utf-8")) | {key: name}
            write_text(file, json.dumps(said, indent=2) + "\n")


@contextlib.contextmanager
def _no_empty_folders(path: Path) -> Generator[None]:
    """Where what is written in `path` fails, takes away the folders around it that were not there before."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else has put something in it
                folder.rmdir()
        raise


def _stored_in(path: Path) -> StoredPrecision:
    """The type of the weights in a model folder, or what the run computed in that trained it; float32 for any other."""
    config = path / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    found = read_origin(path).get("precision") or said.get("dtype") or said.get("torch_dtype")
    return found if found in ("bfloat16", "float16") else "float32"


def _card(run: RunFolder, target: Target) -> str | None:
    """The model card that goes with an export; none for what is no run, and for a command."""
    if target == "vllm" or (target != "card" and not run.recipe_file.is_file()):
        return None
    adapter = target == "adapter" or (target == "card" and (run.model / "adapter_config.json").is_file())
    return model_card(run, "peft" if adapter else None if target in WITH_TYPE else "transformers")


def _default_out(name: str, target: str) -> Path:
    if not Path(name).expanduser().is_dir():
        raise RunError(f"{name}: is not a folder on this machine, so say where to write the export: --out FOLDER")
    return Path(name).expanduser() / "export" / target


def _next_step(settings: ExportSettings, called: str, out: Path) -> list[str]:
    if settings.to == "ollama":
        return [f"Make it known to Ollama: ollama create {called} -f {out / 'Modelfile'}"]
    if settings.to == "vllm":
        return [f"Serve it: {out / 'serve.sh'}"]
    return []


def _pushed(out: Path, repository: str | None) -> list[str]:
    return [f"Uploaded to {push(out, repository)}"] if repository else []
