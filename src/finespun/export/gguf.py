"""A model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What stands in the file is what llama.cpp
computes with, which differs from transformers' weights in places: each is a function here, and all of it is tested by
comparing what the two say. What llama.cpp computes otherwise than transformers is refused, not approximated.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map

from finespun.errors import ModelError
from finespun.export.gguf_quantization import FILE_TYPES, Quantization, encode, encoded_size, require, tensor_type
from finespun.export.gguf_vocab import strips_spaces, write_vocabulary
from finespun.files import replacing
from finespun.models.load import LoadedModel

Transform = Callable[[str, torch.Tensor, Any], torch.Tensor]
"""From transformers' name of a parameter, its values and the config: the values as llama.cpp wants them. Works on
tensors of the device `meta` as well, to know shapes beforehand."""


@dataclass(frozen=True)
class _Architecture:
    gguf: MODEL_ARCH
    activation: str
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    slides: bool = False  # llama.cpp has its sliding windows
    transform: Transform = lambda name, tensor, config: tensor


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    values: Callable[[], torch.Tensor]


def _interleave_heads(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighbours x₂ᵢ, x₂ᵢ₊₁ of a Llama's queries and keys, transformers xᵢ and xᵢ₊d/2."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    halves = tensor.reshape(-1, 2, _head_dim(config) // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _transpose_conv1d(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """GPT-2 keeps the matrices of its layers as `[in, out]`."""
    return tensor.T if ".h." in name and tensor.dim() == 2 else tensor


def _add_one_to_norms(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Gemma multiplies by 1 + weight."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


_LLAMA = _Architecture(MODEL_ARCH.LLAMA, "silu", ("default", "linear", "yarn", "llama3"), transform=_interleave_heads)

ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": _Architecture(MODEL_ARCH.GPT2, "gelu_new", transform=_transpose_conv1d),
    "qwen2": _Architecture(MODEL_ARCH.QWEN2, "silu"),
    "qwen3": _Architecture(MODEL_ARCH.QWEN3, "silu"),
    "gemma2": _Architecture(
        MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", ("default",), slides=True, transform=_add_one_to_norms
    ),
    "gemma3_text": _Architecture(
        MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", ("default", "linear"), slides=True, transform=_add_one_to_norms
    ),
    "phi3": _Architecture(MODEL_ARCH.PHI3, "silu", ("default", "longrope")),
}
"""What can be exported, by transformers' `model_type`."""


def write_gguf(loaded: LoadedModel, file: Path, quantization: Quantization, stop_ids: Sequence[int]) -> None:
    """Writes the model with its tokenizer and chat template to `file`, whole or not at all; each of `stop_ids` ends a
    text. One tensor at a time is copied and converted.

    Raises `ModelError` for a model that llama.cpp does not know or would compute otherwise, for one whose adapter is
    not merged or whose weights are in 4 bits, and for a quantization that this machine cannot make; `RunError` where
    the disk does not take the file.
    """
    architecture = _check(loaded)
    require(quantization)
    model, config = loaded.causal_lm, loaded.causal_lm.config
    tensors = list(_tensors(model, architecture, quantization))
    with (
        replacing(file) as temporary,
        contextlib.closing(GGUFWriter(temporary, MODEL_ARCH_NAMES[architecture.gguf])) as writer,
    ):
        writer.add_type("model")
        writer.add_name(_name(loaded))
        writer.add_file_type(FILE_TYPES[quantization])
        writer.add_quantization_version(2)
        _write_hyperparameters(writer, architecture, config)
        _write_rope(writer, architecture, model)
        embeddings: Any = model.get_input_embeddings()
        write_vocabulary(writer, loaded.tokenizer, embeddings.weight.shape[0], stop_ids)
        _write_tensors(writer, tensors)


def _check(loaded: LoadedModel) -> _Architecture:
    """The architecture of a model that can be written; raises `ModelError` for any other."""
    if loaded.has_adapter:
        raise ModelError("A GGUF file holds one model: merge the adapter into it first.")
    model, config = loaded.causal_lm, loaded.causal_lm.config
    if getattr(model, "is_quantized", False):
        raise ModelError("A model in 4 bits cannot be written as GGUF. Load it without, and choose q4_k_m here.")
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"A model of the architecture {config.model_type} cannot be written as GGUF; these can: "
            f"{', '.join(ARCHITECTURES)}."
        )
    activation = next(
        getattr(config, key)
        for key in ("hidden_activation", "hidden_act", "activation_function")
        if getattr(config, key, None)
    )
    expected_scale = _attention_scale_of_llama_cpp(config)
    for differs, what in (
        (activation != architecture.activation, f"the activation {activation}"),
        (_rope(config).get("rope_type", "default") not in architecture.rope_types, f"rope {_rope(config)}"),
        (getattr(config, "scale_attn_by_inverse_layer_idx", False), "scale_attn_by_inverse_layer_idx"),
        (not getattr(config, "scale_attn_weights", True), "attention without scale"),
        (getattr(config, "query_pre_attn_scalar", expected_scale) != expected_scale, "query_pre_attn_scalar"),
        (getattr(config, "use_bidirectional_attention", False), "attention to what comes later"),
        (_lacks_soft_caps(config), "no soft caps"),
        (architecture.slides and not _tied(model), "a head that is not the embeddings"),
        (architecture.slides and not _slides_as_llama_cpp(config), f"the layers {getattr(config, 'layer_types', '')}"),
    ):
        if differs:
            raise ModelError(f"llama.cpp does not compute a {config.model_type} with {what}.")
    return architecture


def _tensors(model: Any, architecture: _Architecture, quantization: Quantization) -> Iterator[_Tensor]:
    config, layers, tied = model.config, model.config.num_hidden_layers, _tied(model)
    names = get_tensor_name_map(architecture.gguf, layers)
    for name, factors in _rope_factors(model).items():
        yield _Tensor(name, tuple(factors.shape), GGMLQuantizationType.F32, lambda factors=factors: factors)
    for name, parameter in model.named_parameters():  # which names tied ones once
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"GGUF has no place for {name} in a {config.model_type} model.")
        shape = tuple(architecture.transform(name, parameter.to("meta"), config).shape)
        kind = tensor_type(found, shape, quantization, layers, tied)

        def values(name: str = name, parameter: torch.Tensor = parameter) -> torch.Tensor:
            return architecture.transform(name, parameter.detach().to("cpu", torch.float32), config)

        yield _Tensor(found, shape, kind, values)


def _write_tensors(writer: GGUFWriter, tensors: Sequence[_Tensor]) -> None:
    for tensor in tensors:
        size = encoded_size(tensor.shape, tensor.kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encode(tensor.values().contiguous().numpy(), tensor.kind))


def _write_hyperparameters(writer: GGUFWriter, architecture: _Architecture, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(config, architecture))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    heads = config.num_attention_heads
    writer.add_head_count(heads)
    if architecture.gguf == MODEL_ARCH.GPT2:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    if architecture.slides:
        writer.add_sliding_window(config.sliding_window)
    elif architecture.gguf == MODEL_ARCH.PHI3:
        writer.add_sliding_window(0)  # without it older versions of llama.cpp guess one
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _write_rope(writer: GGUFWriter, architecture: _Architecture, model: Any) -> None:
    """Positions by rotation: Su et al. 2021 (arXiv:2104.09864); longer contexts by position interpolation (Chen et al.
    2023, arXiv:2306.15595), YaRN (Peng et al. 2023, arXiv:2309.00071) or LongRoPE (Ding et al. 2024, arXiv:2402.13753).
    """
    if architecture.gguf == MODEL_ARCH.GPT2:
        return
    rope, config = _rope(model.config), model.config
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.gguf == MODEL_ARCH.GEMMA3:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            if not math.isclose(model.model.rotary_emb.attention_scaling, 0.1 * math.log(rope["factor"]) + 1):
                raise ModelError(f"llama.cpp does not compute a {config.model_type} with rope {rope}.")
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)


def _rope_factors(model: Any) -> dict[str, torch.Tensor]:
    """What frequencies are divided by, each `[rotated dimensions / 2]`, where no formula of llama.cpp gives it."""
    rope = _rope(model.config)
    match rope.get("rope_type"):
        case "llama3":
            dimensions = _head_dim(model.config)
            plain = rope["rope_theta"] ** (-torch.arange(0, dimensions, 2).float() / dimensions)
            return {"rope_freqs.weight": plain / model.model.rotary_emb.inv_freq.cpu()}
        case "longrope":
            return {
                f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"]) for length in ("long", "short")
            }
        case _:
            return {}


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters, of the layers that see everything where there are two kinds; empty without rotation."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _context_length(config: Any, architecture: _Architecture) -> int:
    """Tokens. Where llama.cpp does not have a model's sliding window, no more than what is inside it: so far the two
    compute the same."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and "sliding_attention" in kinds and not architecture.slides:
        return min(window, config.max_position_embeddings)
    return config.max_position_embeddings


def _slides_as_llama_cpp(config: Any) -> bool:
    """Whether each second layer of a Gemma 2, each sixth of a Gemma 3, sees everything, and the others a window."""
    period = 2 if config.model_type == "gemma2" else 6
    return [kind == "full_attention" for kind in config.layer_types] == [
        layer % period == period - 1 for layer in range(config.num_hidden_layers)
    ]


def _attention_scale_of_llama_cpp(config: Any) -> float | None:
    """The number by whose root llama.cpp divides a Gemma's attention: it knows the largest by its count of layers."""
    if {"gemma2": 46, "gemma3_text": 62}.get(config.model_type) == config.num_hidden_layers:
        return config.hidden_size / config.num_attention_heads
    return _head_dim(config)


def _lacks_soft_caps(config: Any) -> bool:
    caps = (getattr(config, f"{place}_logit_softcapping", None) for place in ("attn", "final"))
    return config.model_type == "gemma2" and not all(caps)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _name(loaded: LoadedModel) -> str:
    """llama.cpp lets special tokens swallow white space if the name of the model says Phi-3, and only then."""
    name = Path(loaded.base_name).name
    if loaded.causal_lm.config.model_type == "phi3" and strips_spaces(loaded.tokenizer):
        return "Phi-3"
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
