"""`finespun export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from finespun.export.settings import ExportSettings, Quantization, StoredPrecision, Target


def export(
    run: str,
    /,
    *,
    to: Target,
    out: Path | None = None,
    precision: StoredPrecision | None = None,
    gguf_type: Annotated[Quantization | None, Parameter(name="--type")] = None,
    push: str | None = None,
) -> None:
    """Write a trained model for other programs.

    For example: finespun export runs/stories --to ollama --type q8_0

    Parameters
    ----------
    run
        A run folder, a model or adapter folder, a .gguf file, a known name or a hub id.
    to
        A Hugging Face folder (hf), a PEFT folder (adapter), a Hugging Face folder with the adapter folded into the
        weights (merged), a file for llama.cpp (gguf), that file with a Modelfile (ollama), a folder with the command
        that serves it (vllm), or a model card (card).
    out
        Folder to write [default: RUN/export/ and the target].
    precision
        How hf, merged and vllm store the weights [default: hf as they are, merged in float32, vllm in what the run
        computed in].
    gguf_type
        How gguf and ollama store the weights [default: f16].
    push
        Also upload the folder to this repository of the Hugging Face hub, OWNER/NAME. A new one is made private.
    """
    settings = ExportSettings(to, out, precision, gguf_type, push)

    from finespun.export import folders

    for line in folders.export(run, settings):
        print(line)
