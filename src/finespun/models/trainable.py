"""Which numbers of a model a run trains: all weights, some of them, an adapter's or a soft prompt's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from finespun.errors import RecipeError
from finespun.models.adapters import add_lora, add_prefix, add_prompt, has_soft_prompt, lora_start, merge
from finespun.models.gradient_checkpointing import decoder_layers
from finespun.models.load import LoadedModel
from finespun.recipe import Method, Recipe


def make_trainable(loaded: LoadedModel, recipe: Recipe, new_tokens: Sequence[int] = ()) -> int:
    """Sets which parameters get a gradient, adding the adapter where the recipe's method has one; returns how many
    numbers that is. Beside a LoRA adapter the embeddings of `new_tokens` are trained. An adapter that is there already
    is trained on. Raises `RecipeError` for settings that do not fit the model, `ModelError` for names it lacks."""
    method = recipe.training.method
    if method == "full":
        if loaded.has_adapter:
            loaded.model = merge(loaded.model)
        loaded.model.requires_grad_(True)
        freeze(loaded.causal_lm, recipe.training.freeze or [])
    elif loaded.has_adapter:
        _train_on(loaded, recipe)
    else:
        torch.manual_seed(recipe.training.seed)
        if method in ("lora", "qlora"):
            if recipe.lora.initial == "pissa" and (new_tokens or method == "qlora"):
                raise RecipeError(
                    "lora.initial pissa needs whole weights, and no new tokens of data.chat_template chatml."
                )
            loaded.model = add_lora(loaded.causal_lm, recipe.lora, new_tokens)
            loaded.pissa_start = lora_start(loaded.model) if recipe.lora.initial == "pissa" else None
        elif new_tokens:
            raise RecipeError(
                f"data.chat_template chatml brings new tokens, whose embeddings training.method {method} does not "
                "train. Choose method lora or full, or data.chat_template plain."
            )
        elif method == "prompt-tuning":
            text = recipe.soft_prompt.initial_text or ""
            ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            loaded.model = add_prompt(loaded.causal_lm, recipe.soft_prompt, ids)
        else:
            loaded.model = add_prefix(loaded.causal_lm, recipe.soft_prompt)
    return sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)


def freeze(model: Any, what: Sequence[str]) -> None:
    """Leaves parts of `model` without a gradient: "embeddings", "first-N" layers, or patterns of parameter names.

    Raises `RecipeError` for what matches nothing, or if nothing would be left to train.
    """
    layers = decoder_layers(model)
    for part in what:
        if part == "embeddings":
            frozen = [model.get_input_embeddings().weight]
        elif match := re.fullmatch(r"first-(\d+)", part):
            count = int(match[1])
            if not 0 < count <= len(layers):
                raise RecipeError(f"training.freeze {part}: the model has {len(layers)} layers.")
            frozen = [parameter for layer in layers[:count] for parameter in layer.parameters()]
        else:
            frozen = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, part)]
        if not frozen:
            names = [name for name, _ in model.named_parameters()]
            raise RecipeError(
                f"training.freeze {part}: matches no parameter. The names are like {names[0]} and {names[-1]}."
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("training.freeze: leaves nothing to train.")


def _train_on(loaded: LoadedModel, recipe: Recipe) -> None:
    """Goes on with the adapter that the model has; the recipe then says what that is."""
    config = loaded.model.active_peft_config
    methods: dict[str, Sequence[Method]] = {
        "LORA": ("lora", "qlora"),
        "PROMPT_TUNING": ("prompt-tuning",),
        "PREFIX_TUNING": ("prefix-tuning",),
    }
    kind = str(config.peft_type.value)
    if recipe.training.method not in methods.get(kind, ()):
        raise RecipeError(
            f"{recipe.model} has an adapter of kind {kind}, and training.method {recipe.training.method} would need "
            "another one beside it. Train it on with its own method, or save the model merged first: "
            'finespun.load(…).save("merged", merge_adapter=True)'
        )
    if has_soft_prompt(loaded.model):
        loaded.model.prompt_encoder.requires_grad_(True)
        recipe.soft_prompt.virtual_tokens = config.num_virtual_tokens
    else:
        recipe.lora.rank, recipe.lora.alpha = config.r, config.lora_alpha
        recipe.lora.rank_stabilized, recipe.lora.dora = config.use_rslora, config.use_dora
