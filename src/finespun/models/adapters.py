"""LoRA adapters, through `peft`: put beside a model, folded into it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from finespun.errors import ModelError
from finespun.models.load import quiet_transformers
from finespun.recipe import LoraRecipe


def add_lora(model: PreTrainedModel, recipe: LoraRecipe) -> PeftModel:
    """`model` with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), its own weights frozen. The update starts
    at zero; its random half comes from torch's global generator. Raises `ModelError` for names it lacks."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # ty: ignore[invalid-argument-type]  # peft computes with it as a float
        target_modules=recipe.target_modules,
        # GPT-2 keeps its weights transposed; peft finds that out by itself but warns when it was not told
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {error}") from None


def merge(model: Any) -> PreTrainedModel:
    """The model with its adapter folded into the weights: base + alpha / rank * B A. The adapter is gone afterwards."""
    return model.merge_and_unload()
