"""Adapters, through `peft`: LoRA and its kin beside a model's weights, soft prompts before its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from finespun.errors import ModelError
from finespun.models.load import quiet_transformers
from finespun.recipe import LoraRecipe, SoftPromptRecipe

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: PreTrainedModel, recipe: LoraRecipe, new_tokens: Sequence[int] = ()) -> PeftModel:
    """`model` with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), its own weights frozen. The adapter changes
    nothing of what the model says before it is trained; its random half comes from torch's global generator. The rows
    of `new_tokens` in embeddings and head are trained and saved with it. Raises `ModelError` for names it lacks."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # ty: ignore[invalid-argument-type]  # peft computes with it as a float
        target_modules=recipe.target_modules,
        modules_to_save=recipe.trained_modules,
        ensure_weight_tying=recipe.trained_modules is not None,
        use_rslora=recipe.rank_stabilized,
        use_dora=recipe.dora,
        init_lora_weights="pissa_niter_16" if recipe.initial == "pissa" else True,  # ty: ignore[invalid-argument-type]
        trainable_token_indices=_token_rows(model, new_tokens) if new_tokens else None,
        # GPT-2 keeps its weights transposed; peft finds that out by itself but warns when it was not told
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {error}") from None


def lora_start(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the matrices that a LoRA adapter has now, by name: what `unroll_pissa` needs after the training."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def unroll_pissa(model: Any, start: dict[str, torch.Tensor], recipe: LoraRecipe) -> PeftModel:
    """An adapter that began as a part of the weights, made one beside the weights as they were, as any program expects:
    (W - s B₀A₀) + s BA = W + s [B, -B₀][A; A₀], of twice the rank (Meng et al. 2024, arXiv:2404.02948, section 4)."""
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    base = model.unload()
    scale = recipe.alpha / (recipe.rank**0.5 if recipe.rank_stabilized else recipe.rank)
    for name, a in start.items():
        if ".lora_A." in name:
            weight = base.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0]).weight
            update = scale * start[name.replace(".lora_A.", ".lora_B.")] @ a
            weight += (update if update.shape == weight.shape else update.T).to(weight.dtype)
    alpha = recipe.alpha * (2**0.5 if recipe.rank_stabilized else 2)
    plain = recipe.model_copy(update={"initial": "zero", "rank": 2 * recipe.rank, "alpha": alpha})
    unrolled = add_lora(base, plain)
    for name, value in unrolled.named_parameters():
        if ".lora_A." in name:
            value.copy_(torch.cat([trained[name], start[name]]))
        elif ".lora_B." in name:
            value.copy_(torch.cat([trained[name], -start[name]], 1))
        elif name in trained:
            value.copy_(trained[name])
    return unrolled


def add_prompt(model: PreTrainedModel, recipe: SoftPromptRecipe, initial_ids: Sequence[int]) -> PeftModel:
    """`model`, frozen, with trained embeddings before its input: prompt tuning (Lester et al. 2021, arXiv:2104.08691).
    They start as the embeddings of `initial_ids`, over and over, or of tokens from torch's global generator."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.virtual_tokens)
    with quiet_transformers():
        prompted = get_peft_model(model, config, autocast_adapter_dtype=False)
    count = recipe.virtual_tokens
    ids = list(initial_ids) * -(-count // len(initial_ids)) if initial_ids else []
    start = torch.tensor(ids[:count]) if ids else torch.randint(model.config.vocab_size, (count,))
    table: Any = model.get_input_embeddings()
    encoder: Any = prompted.prompt_encoder["default"]
    encoder.embedding.weight.data = table.weight.detach()[start.to(table.weight.device)].clone()
    return prompted


def add_prefix(model: PreTrainedModel, recipe: SoftPromptRecipe) -> PeftModel:
    """`model`, frozen, with trained keys and values before those of each layer: prefix tuning (Li & Liang 2021,
    arXiv:2101.00190), without reparametrization. They start small and random."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.virtual_tokens)
    with quiet_transformers():
        prefixed = get_peft_model(model, config, autocast_adapter_dtype=False)
    encoder: Any = prefixed.prompt_encoder["default"]
    torch.nn.init.normal_(encoder.embedding.weight, std=0.02)
    return prefixed


def has_soft_prompt(model: Any) -> bool:
    """Whether something stands before all that `model`, a `PeftModel` or a plain one, reads."""
    return hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning


def soft_prompt_cache(model: Any, rows: int) -> tuple[Cache, int] | None:
    """What `rows` sequences begin with in the cache of keys and values, and how many tokens that is; None without a
    soft prompt. A prompt's embeddings go through the model; a prefix is the cache itself. Has a gradient."""
    if not has_soft_prompt(model):
        return None
    base, count = model.get_base_model(), model.active_peft_config.num_virtual_tokens
    prompt = model.get_prompt(batch_size=rows)
    if not isinstance(prompt, torch.Tensor):
        return prompt if isinstance(prompt, Cache) else DynamicCache(prompt), count
    cache = DynamicCache(config=base.config)
    base(inputs_embeds=prompt.to(base.dtype), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, count


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
    """The model with its adapter folded into the weights, base + scale × B A; of a base in 4 bits, into what these
    stand for, since the sum would be rounded to 4 bits again. The adapter is gone afterwards. Raises `ModelError` for
    a soft prompt, which is not a change of weights."""
    if has_soft_prompt(model):
        raise ModelError("A soft prompt cannot be folded into the weights. Save it as the adapter that it is.")
    if getattr(model.get_base_model(), "is_quantized", False):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        state, config = get_peft_model_state_dict(model), model.active_peft_config
        base = model.unload()
        base.dequantize()
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(model, state)
    return model.merge_and_unload()
