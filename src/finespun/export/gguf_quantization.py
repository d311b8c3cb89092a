"""Number formats of GGUF tensors: which tensor gets which, and its bytes.

K-quants are computed by llama.cpp itself (`ggml_quantize_chunk`, which the `xllamacpp` wheels for Linux export); all
else by the `gguf` package.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from numpy.typing import NDArray

from finespun.errors import ModelError
from finespun.export.settings import Quantization

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

_T = GGMLQuantizationType

FILE_TYPES: dict[Quantization, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}

_PLAIN: dict[Quantization, GGMLQuantizationType] = {
    "f32": _T.F32,
    "f16": _T.F16,
    "bf16": _T.BF16,
    "q8_0": _T.Q8_0,
    "q6_k": _T.Q6_K,
    "q5_k_m": _T.Q5_K,
    "q4_k_m": _T.Q4_K,
}

_NARROWER = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0, _T.Q5_0: _T.F16, _T.Q5_1: _T.F16, _T.Q8_0: _T.F16}
"""What a tensor gets whose rows are no multiple of a block: K-quants have blocks of 256 numbers, the others of 32."""

_BY_LLAMA_CPP = {_T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q5_0, _T.Q5_1}


def tensor_type(
    name: str, shape: Sequence[int], quantization: Quantization, layers: int, tied: bool
) -> GGMLQuantizationType:
    """The format of the tensor `name` of a model of `layers` layers; with `tied` embeddings these are the head too.

    Vectors and positions stay in float32. The mixtures "_m" are those of llama.cpp: more bits for the head, and in the
    first and last eighth of the layers and every third between them for values and the second half of the MLP.
    """
    if len(shape) == 1 or name == "position_embd.weight":
        return _T.F32
    found = _PLAIN[quantization]
    part = name.split(".")[2] if name.startswith("blk.") else name
    if quantization in ("q4_k_m", "q5_k_m"):
        head = part == "output.weight" or (tied and part == "token_embd.weight")
        if head or (part in ("attn_v", "ffn_down") and _gets_more_bits(int(name.split(".")[1]), layers)):
            found = _T.Q6_K
        elif part == "attn_qkv":
            found = _T.Q5_K if quantization == "q4_k_m" else _T.Q6_K
    while shape[-1] % GGML_QUANT_SIZES[found][0]:
        found = _NARROWER[found]
    return found


def encoded_size(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of `shape` in the format `kind`."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """`values` in the format `kind`. Raises `ModelError` where they do not fit, or where llama.cpp is needed and not
    there."""
    if kind in _BY_LLAMA_CPP:
        encoded = np.empty(encoded_size(values.shape, kind), dtype=np.uint8)
        width = values.shape[-1]
        _llama_cpp_quantizer()(kind, values.ctypes.data, encoded.ctypes.data, 0, values.size // width, width, None)
        return encoded
    if kind == _T.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError("A weight of this model is too large for float16. Export it as bf16 or q8_0.")
    return quants.quantize(values, kind)


def require(quantization: Quantization) -> None:
    """Raises `ModelError` where this machine cannot write `quantization`."""
    if _PLAIN[quantization] in _BY_LLAMA_CPP:
        _llama_cpp_quantizer()


@functools.cache
def _llama_cpp_quantizer() -> Any:
    """`ggml_quantize_chunk(type, source, target, start, rows, width, importance)` of llama.cpp, from ggml.h."""
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        raise ModelError("K-quants are computed by llama.cpp: pip install 'finespun[llama-cpp]'") from None
    quantizer = getattr(ctypes.CDLL(xllamacpp.__file__), "ggml_quantize_chunk", None)
    if quantizer is None:
        raise ModelError(
            "The xllamacpp package of this system does not give access to llama.cpp's quantization. Export as q8_0, or "
            "as f16 and use llama.cpp's own llama-quantize."
        )
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantizer.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    quantizer.restype = ctypes.c_size_t
    return quantizer


def _gets_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
