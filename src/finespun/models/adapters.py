"""LoRA adapters, through `peft`: put beside a model, folded into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from finespun.errors import ModelError
from finespun.models.load import quiet_transformers
from finespun.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: PreTrainedModel, recipe: LoraRecipe, new_tokens: Sequence[int] = ()) -> PeftModel:
    """`model` with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), its own weights frozen. The update starts
    at zero; its random half comes from torch's global generator. The rows of `new_tokens` in embeddings and head are
    trained and saved with it. Raises `ModelError` for names it lacks."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # ty: ignore[invalid-argument-type]  # peft computes with it as a float
        target_modules=recipe.target_modules,
        trainable_token_indices=_token_rows(model, new_tokens) if new_tokens else None,
        # GPT-2 keeps its weights transposed; peft finds that out by itself but warns when it was not told
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {error}") from None


def head_weight(head: torch.nn.Module) -> torch.Tensor | None:
    """The matrix `[vocab, dim]` by which an output layer multiplies, with the rows that an adapter trains in it; None
    for a layer that does something else."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is not None:
        return adapter.get_merged_weights(adapter.active_adapters)
    return head.weight if isinstance(head, torch.nn.Linear) else None


def _token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """Where the rows of `tokens` are: in the embeddings, and in a head of its own if the model has one."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if layers[0].weight is layers[1].weight:
        return list(tokens)
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[layer]: list(tokens) for layer in layers}


def merge(model: Any) -> PreTrainedModel:
    """The model with its adapter folded into the weights: base + alpha / rank * B A. The adapter is gone afterwards."""
    return model.merge_and_unload()
