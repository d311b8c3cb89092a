"""Adapters with random weights, in folders as peft writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase


def write_adapter(
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 1,
    config: PeftConfig | None = None,
    rows: bool = True,
    **lora: Any,
) -> Path:
    """An adapter of the model in `base`, large enough to change what that writes. With `rows`, peft decides whether
    embeddings are saved with it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, **({} if rows else {"save_embedding_layers": False}))
    tokenizer.save_pretrained(folder)
    return folder
