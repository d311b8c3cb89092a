"""What a person can say about an export. Light to import: the command line shows it in its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finespun.errors import RecipeError

Target = Literal["hf", "adapter", "merged", "gguf", "ollama", "vllm", "card"]
StoredPrecision = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]

WITH_PRECISION = ("hf", "merged", "vllm")
WITH_TYPE = ("gguf", "ollama")


@dataclass(frozen=True)
class ExportSettings:
    """What is written, where, and how exactly. Raises `RecipeError` for settings that exclude each other.

    `out` is `RUN/export/` and the target where it is not given; `precision` and `gguf_type` say how weights are stored.
    """

    to: Target
    out: Path | None = None
    precision: StoredPrecision | None = None
    gguf_type: Quantization | None = None
    push: str | None = None

    def __post_init__(self) -> None:
        if self.precision and self.to not in WITH_PRECISION:
            instead = "give --type" if self.to in WITH_TYPE else "leave it out"
            raise RecipeError(f"--precision is for {', '.join(WITH_PRECISION)}; with {self.to}, {instead}.")
        if self.gguf_type and self.to not in WITH_TYPE:
            instead = "give --precision" if self.to in WITH_PRECISION else "leave it out"
            raise RecipeError(f"--type is for {', '.join(WITH_TYPE)}; with {self.to}, {instead}.")
        if self.push and self.to == "vllm":
            raise RecipeError("--push does not go with vllm, whose command is for your machines; push hf or merged.")
