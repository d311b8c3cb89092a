"""The model card: a README.md in the hub's format that says what a run was made of and what came out, from nothing but
the run folder. No path of the machine that trained it is in it.

The format: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from finespun.models.catalog import KNOWN_MODELS
from finespun.models.load import LoadedModel, read_origin
from finespun.runs import RunFolder

EXAMPLES = 3


def model_card(run: RunFolder, library: str | None) -> str:
    """The card of a finished run whose weights `library` loads ("transformers", "peft"; None for GGUF). Raises
    `RunError` for a folder that holds no run, or a torn one."""
    recipe = run.recipe().model_dump(exclude_none=True)
    manifest = run.manifest()
    base, base_licence = _base(manifest["base"]["name"])
    name = run.path.absolute().name
    metadata = ModelCardData(
        base_model=base if hub_id(base) else None,
        license=base_licence,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["finespun", recipe["training"]["method"], *([] if library else ["gguf"])],
        datasets=_hub_data(recipe["data"]) or None,
        training_data=[{"file": _public(file), "sha256": sha256} for file, sha256 in manifest["data"]["files"].items()],
    )
    made = f"finespun {manifest['environment']['versions']['finespun']}, {manifest['started'][:10]}"
    parts = [
        f"# {name}",
        f"{base}, trained ({recipe['training']['method']}) on {manifest['data']['train']} examples with {made}.",
        _results(manifest),
        _data(manifest["data"]),
        _licence(base, base_licence, manifest["data"]["files"]),
        _examples(run),
        f"## Recipe\n\n{_fenced(_without_paths(recipe), 'yaml')}",
    ]
    return str(ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def hub_id(name: str) -> str | None:
    """The hub's name of the model that finespun calls `name`; None for one that is only on this machine."""
    if known := KNOWN_MODELS.get(name.lower()):
        return known.hub_id
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def hub_id_of(loaded: LoadedModel) -> str | None:
    """The hub's name of the base of a model, also where it was given as a folder: of the hub's own cache, or the copy
    of a packaged model. None for one that is only on this machine."""
    if found := hub_id(loaded.base_name):
        return found
    if cached := re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", loaded.base_path.absolute().as_posix()):
        return "/".join(cached.groups())
    package = read_origin(loaded.base_path).get("from")
    packaged = (known for known in KNOWN_MODELS.values() if known.package and known.package.distribution == package)
    return next((known.hub_id for known in packaged), None)


def _base(name: str) -> tuple[str, str | None]:
    """What a base model is called in public, and its licence if that is known: of one that was itself trained here,
    those of the model that it began as."""
    while (Path(name) / "manifest.json").is_file():
        name = RunFolder(Path(name)).manifest()["base"]["name"]
    public = hub_id(name)
    licence = next((model.licence for model in KNOWN_MODELS.values() if model.hub_id == public), None)
    return public or Path(name).name, licence


def _results(manifest: Mapping[str, Any]) -> str:
    results = manifest.get("results")
    if not results:
        return "## Results\n\nNo text was held out in this run, so nothing is known about how well it generalizes."
    rows = [
        ("perplexity before", results["perplexity_before"]),
        ("perplexity after", results["perplexity_after"]),
        ("after / before, paired", results["perplexity_ratio"]),
    ]
    table = [f"| {what} | {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} |" for what, value in rows]
    held_out = manifest["data"]["validation"]
    return "\n".join(
        [
            f"## Results\n\nOn {held_out} held-out examples; intervals by bootstrap over examples.\n",
            "| | value | 95 % interval |",
            "| --- | --- | --- |",
            *table,
        ]
    )


def _data(data: Mapping[str, Any]) -> str:
    counts = (
        f"{data['train']} examples trained ({data['train_tokens']:,} tokens, {data['train_loss_tokens']:,} of them "
        f"with loss), {data['validation']} held out, {data['dropped']} left out."
    )
    rows = [f"| `{_public(file)}` | `{sha256}` |" for file, sha256 in data["files"].items()]
    return "\n".join([f"## Data\n\n{counts}\n", "| file | SHA-256 |", "| --- | --- |", *rows])


def _licence(base: str, licence: str | None, files: Mapping[str, str]) -> str:
    said = f"is under the licence `{licence}`" if licence else "has a licence that finespun does not know: look it up"
    data = ", ".join(f"`{_public(file)}`" for file in files)
    return (
        f"## Licence\n\nThe base model {base} {said}; it holds for these weights too. The licence of the data "
        f"({data}) is known to those who trained on it, and they have to check that both allow what they publish."
    )


def _examples(run: RunFolder) -> str:
    """Held-out prompts with the texts before and after."""
    shown = []
    for sample in [sample for sample in run.samples() if "after" in sample][:EXAMPLES]:
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        parts = [("Prompt", prompt), ("Before", sample["before"]), ("After", sample["after"])]
        shown.append("\n\n".join(f"{what}:\n\n{_fenced(text)}" for what, text in parts))
    return "## Examples\n\nWritten greedily.\n\n" + "\n\n---\n\n".join(shown) if shown else ""


def _hub_data(data: Mapping[str, Any]) -> list[str]:
    """Names on the hub of the data sets among the sources, without configuration and split."""
    named = [re.match(r"hf:([^/\[:][^\[:]*)", source) for source in data.get("source", [])]
    return [match[1] for match in named if match]


def _public(source: str) -> str:
    """A data set of the hub by its name, a file by its name without its folder."""
    hub = source.startswith("hf:")
    name = source.removeprefix("hf:")
    return source if hub and not Path(name).is_absolute() else ("hf:" if hub else "") + Path(name).name


def _without_paths(recipe: dict[str, Any]) -> str:
    """The recipe as YAML, in which files and folders have their names alone."""
    data = dict(recipe["data"])
    for key in ("source", "validation"):
        if isinstance(data.get(key), list):
            data[key] = list(map(_public, data[key]))
    model = recipe["model"] if hub_id(recipe["model"]) else Path(recipe["model"]).name
    public = {key: value for key, value in recipe.items() if key != "out"} | {"model": model, "data": data}
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True)


def _fenced(text: str, language: str = "") -> str:
    """A Markdown block that no text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
