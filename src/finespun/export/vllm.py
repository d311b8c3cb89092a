"""vLLM: the command that serves an exported folder as finespun writes with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finespun.files import write_text
from finespun.generation.settings import Sampling

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""


class Adapter(NamedTuple):
    """A LoRA adapter, in the folder `path` when it is served, beside the model `base`."""

    base: str
    path: str
    rank: int


def serve_command(
    name: str, folder: Path, shown: str, context_length: int, precision: str, adapter: Adapter | None = None
) -> list[str]:
    """The arguments of `vllm serve` for the model in `folder`, called `name` by its clients, or for the same model
    as an `adapter` beside its base.

    Where the command runs, the folder has the path `shown`; tokenizer and stop tokens are taken from it in both cases.
    What a request does not ask for is as finespun's own default, whatever the model's generation config says.
    """
    if adapter:
        rank = next(rank for rank in LORA_RANKS if rank >= adapter.rank)
        modules = json.dumps({"name": name, "path": adapter.path})
        command = ["vllm", "serve", adapter.base, "--enable-lora", "--lora-modules", modules]
        # an adapter's own folder has no generation config; without one, what the base suggests would be taken
        defaults = shown if (folder / "generation_config.json").is_file() else "vllm"
        command += ["--max-lora-rank", str(rank), "--tokenizer", shown, "--generation-config", defaults]
    else:
        command = ["vllm", "serve", shown, "--served-model-name", name]
    command += ["--max-model-len", str(context_length), "--dtype", precision]
    if (folder / "chat_template.jinja").is_file():
        command += ["--chat-template", f"{shown}/chat_template.jinja"]
    return [*command, "--override-generation-config", json.dumps(_sampling(folder))]


def adapter_rank(config: Mapping[str, Any]) -> int | None:
    """The rank of the adapter with this `adapter_config.json` if vLLM can serve it beside its base, else None."""
    others = ("use_dora", "modules_to_save", "trainable_token_indices")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, others)):
        return None
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return rank if rank <= LORA_RANKS[-1] else None


def write_script(path: Path, command: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Writes a shell script that runs `command` in the script's own folder, with further arguments behind it; `beside`,
    the command that serves the adapter beside its base, is there to be copied."""
    lines = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1', f'exec {shlex.join(command)} "$@"']
    if beside:
        lines += ["# With the adapter beside its base, which can serve several at once, in 16 bits:"]
        lines += [f"# {shlex.join(beside)}"]
    write_text(path, "\n".join(lines) + "\n")
    path.chmod(0o755)


def _sampling(folder: Path) -> dict[str, Any]:
    """finespun's defaults, for the temperature and for what the generation config in `folder` would have otherwise."""
    ours = Sampling().model_dump(include={"temperature", "top_p", "min_p", "repetition_penalty"}) | {"top_k": -1}
    file = folder / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in ours.items() if key == "temperature" or key in said}
