"""A location → a model and its tokenizer, ready on the best device here. Nothing is unpickled, no remote code runs."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from finespun.errors import ModelError
from finespun.files import new_folder
from finespun.models.catalog import (
    CONVERSION,
    KNOWN_MODELS,
    ORIGIN_FILE,
    Location,
    check_package_file,
    converted_folder,
    locate,
    weights_sha256,
)

Precision = Literal["float32", "bfloat16"]


@dataclass
class LoadedModel:
    """A causal language model in memory. `model` is a `PreTrainedModel` or, with an adapter, a `PeftModel` around it.

    `base_name` and `base_path` (a folder or a GGUF file) say where the weights are on disk: all of them or, with an
    adapter, those below it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    base_name: str
    base_path: Path
    pissa_start: dict[str, torch.Tensor] | None = None
    """What an adapter began as that took this out of the weights; `unroll_pissa` puts it back."""

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The `transformers` model itself, with the layers of an adapter in it if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens, without a soft prompt before it; 2048 where its config
        does not say."""
        before = getattr(self.model.active_peft_config, "num_virtual_tokens", None) if self.has_adapter else None
        return _context_length(self.causal_lm.config) - (before or 0)


def default_device() -> torch.device:
    """A CUDA GPU, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


@functools.cache
def faster_precision(device: torch.device) -> Precision:
    """bfloat16 where matrix products in it, measured, are at least 1.5 times as fast as in float32; else float32. A GPU
    is asked, since products that take long enough to tell would take a while."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((256, 576), (576, 576)))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (left @ right)[0, 0].item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


def compute_in(model: Any, dtype: torch.dtype) -> Any:
    """Converts the weights of `model` to `dtype`, in place. Buffers keep theirs: the frequencies of rotary positions,
    rounded to bfloat16, would put far tokens in the wrong place. Quantized weights stay quantized."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Inside, transformers draws no progress bars and says nothing below an error: what matters is said by finespun."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    # imported by peft where it is installed, it would ask for a package that only downloads a faster kernel
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is being replaced
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@quiet_transformers()
def load_model(
    name: str, precision: Precision | None = None, device: torch.device | None = None, four_bits: bool = False
) -> LoadedModel:
    """The model called `name`: a known name, hub id, model folder, run folder, adapter folder, or `.gguf` file.

    A model that finespun trained computes in the precision it was trained in, so that it writes the same texts; any
    other, and a bfloat16 one where bfloat16 is slow, in the faster one. With `four_bits` the matrices between
    embeddings and head are kept as 4-bit NormalFloats (Dettmers et al. 2023, arXiv:2305.14314) and made large again in
    each product; an adapter that was trained beside such a model gets one again. Raises `ModelNotFound` and
    `ModelError`.
    """
    device = device or default_device()
    location = locate_model(name)
    origin = read_origin(location.path)
    if precision is None:
        precision = "float32" if origin.get("precision") == "float32" else faster_precision(device)
    dtype: torch.dtype = getattr(torch, precision)
    if location.kind == "gguf":
        if four_bits:
            raise ModelError(f"{location.path}: 4 bits are made of a model folder, not of a .gguf file.")
        model, tokenizer = _load_gguf(location.path)
        compute_in(model, dtype)
        loaded = LoadedModel(model, tokenizer, name, location.path)
    elif (location.path / "adapter_config.json").is_file():
        loaded = _load_adapter(location.path, origin, precision, device, four_bits)
    else:
        loaded = _load_folder(location, origin, dtype, four_bits)
    loaded.model.to(device)
    loaded.model.eval()
    return loaded


@quiet_transformers()
def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer and the context length, in tokens, of the model called `name`, without its weights. Raises as
    `load_model` does."""
    location = locate_model(name)
    file = {"gguf_file": location.path.name} if location.kind == "gguf" else {}
    folder = location.path.parent if file else location.path
    try:
        tokenizer = _load_tokenizer(folder, **file)
        if (folder / "adapter_config.json").is_file():
            return tokenizer, load_tokenizer(base_of(folder, read_origin(folder)))[1]
        return tokenizer, _context_length(AutoConfig.from_pretrained(str(folder), **file))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{location.path}: its tokenizer cannot be loaded: {error}") from error


@quiet_transformers()
def grow_vocabulary(loaded: LoadedModel) -> list[int]:
    """Gives the model an embedding, and an output row, for each token that its tokenizer has got beyond them; returns
    the ids of these tokens. They start as what tokens are on average (Hewitt 2021), and are to be trained."""
    model = loaded.causal_lm
    rows = int(model.get_input_embeddings().weight.shape[0])  # ty: ignore[not-subscriptable]
    size = len(loaded.tokenizer)
    if size > rows:
        with torch.random.fork_rng(devices=[]):  # the same run starts from the same embeddings
            torch.manual_seed(0)
            model.resize_token_embeddings(size)
    return list(range(rows, size))


@quiet_transformers()
def save_model(loaded: LoadedModel, stop_ids: Sequence[int], folder: Path) -> None:
    """Writes the model as a Hugging Face folder, or its adapter as a PEFT folder, whole or not at all: weights as
    safetensors, tokenizer, and a generation config in which each of `stop_ids` ends a text. Raises `RunError`."""
    model = loaded.causal_lm
    model.generation_config.eos_token_id = list(stop_ids)
    model.generation_config.pad_token_id = loaded.tokenizer.eos_token_id
    origin: dict[str, Any] = {"precision": str(model.dtype).removeprefix("torch.")}
    if loaded.has_adapter:
        origin |= {
            "base_name": loaded.base_name,
            "base_sha256": weights_sha256(loaded.base_path),
            "four_bits": getattr(model, "is_quantized", False),
        }
    with new_folder(folder) as new:
        # an adapter holds the rows of new tokens; peft would add the whole embeddings of a model that has grown
        loaded.model.save_pretrained(new, **({"save_embedding_layers": False} if loaded.has_adapter else {}))
        loaded.tokenizer.save_pretrained(new)
        (new / "README.md").unlink(missing_ok=True)  # peft's empty model card
        (new / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def read_origin(path: Path) -> dict[str, Any]:
    """What finespun wrote beside a model's weights; empty for any other model."""
    file = path / ORIGIN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def locate_model(name: str) -> Location:
    """Where the model called `name` is, as a folder or file that can be read. Raises as `locate` does."""
    location = locate(name)
    return _convert_packaged(location) if location.kind == "package" else location


def _convert_packaged(location: Location) -> Location:
    """Dequantizes a packaged GGUF once into finespun's cache as a plain folder; later loads start from there."""
    known = KNOWN_MODELS[location.name.lower()]
    assert known.package is not None
    check_package_file(location.path, known.package)
    model, tokenizer = _load_gguf(location.path)
    model.config._name_or_path = known.hub_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    target = converted_folder(location.name.lower())
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        origin = {
            "from": known.package.distribution,
            "conversion": CONVERSION,
            "gguf_sha256": known.package.sha256,
            "weights_sha256": weights_sha256(folder),
        }
        (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return Location(location.name, target, "folder")


def _load_folder(location: Location, origin: dict[str, Any], dtype: torch.dtype, four_bits: bool) -> LoadedModel:
    if "weights_sha256" in origin and weights_sha256(location.path) != origin["weights_sha256"]:
        raise ModelError(
            f"{location.path}: the converted weights are damaged (their SHA-256 is not the recorded one). "
            "Delete the folder; it is made anew."
        )
    try:
        tokenizer = _load_tokenizer(location.path)
        model = AutoModelForCausalLM.from_pretrained(
            str(location.path),
            dtype=dtype,
            use_safetensors=True,
            quantization_config=_four_bits(dtype) if four_bits else None,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{location.path}: cannot be loaded as a causal language model: {error}") from error
    # where a CPU has bfloat16, bitsandbytes would pack weights anew in any pass without a gradient, which its own
    # backward pass and merging do not know, and which fails for matrices narrower than a block
    quantized: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in quantized:
        module.support_avx512bf16_for_cpu = False
    return LoadedModel(model, tokenizer, location.name, location.path)


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("4 bits need the package bitsandbytes: pip install 'finespun[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _load_tokenizer(folder: Path, **options: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    if tokenizer is None:
        raise ModelError(f"{folder}: has no tokenizer.")
    if "gguf_file" in options:
        _split_as_named(tokenizer, folder / options["gguf_file"])
    return tokenizer


def _split_as_named(tokenizer: Any, file: Path) -> None:
    """Makes a tokenizer that was read from a GGUF file split digits as the file says: transformers gives all Llamas the
    words of GPT-2, in which some spaces before a digit are another token."""
    named = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if named is not None and named.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's weights, dequantized to float32, in a plain model (the one transformers returns refuses saving)."""
    try:
        tokenizer = _load_tokenizer(path.parent, gguf_file=path.name)
        read = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{path}: cannot be read as a GGUF model: {error}") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain, tokenizer


def _load_adapter(
    folder: Path, origin: dict[str, Any], precision: Precision, device: torch.device, four_bits: bool
) -> LoadedModel:
    from peft import PeftConfig, PeftModel

    name = base_of(folder, origin)
    base = load_model(name, precision, device, four_bits or origin.get("four_bits", False))
    if "base_sha256" in origin and weights_sha256(base.base_path) != origin["base_sha256"]:
        raise ModelError(
            f"{folder}: this adapter was trained on other weights of {name} than those in {base.base_path}; it "
            "would write something else there."
        )
    tokenizer = _load_tokenizer(folder)
    grow_vocabulary(LoadedModel(base.model, tokenizer, base.base_name, base.base_path))
    trainable = not PeftConfig.from_pretrained(str(folder)).is_prompt_learning  # peft refuses that for a soft prompt
    model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False)
    compute_in(model, base.model.dtype)
    return LoadedModel(model, tokenizer, base.base_name, base.base_path)


def base_of(adapter: Path, origin: dict[str, Any]) -> str:
    """The name under which the model below the adapter in a folder, beside which stands `origin`, can be loaded."""
    from peft import PeftConfig

    name = origin.get("base_name") or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter}: the adapter does not say which model it belongs to.")
    return name


def _context_length(config: PreTrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)
