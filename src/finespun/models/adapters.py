"""Adapters, through `peft`: LoRA and its kin beside a model's weights, soft prompts before its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import Cache, DynamicCache, PreTrainedModel

from finespun.errors import ModelError
from finespun.models import load
from finespun.models.catalog import weights_sha256
from finespun.models.load import LoadedModel, Precision, compute_in, locate_model, quiet_transformers, read_origin
from finespun.recipe import LoraRecipe, SoftPromptRecipe

if TYPE_CHECKING:
    from peft import PeftModel

MAY_DIFFER = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
}
"""What peft's configs of plain LoRA adapters may say; any other field that is set means more than W + scale × B A."""


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


@dataclass(eq=False)
class LoraAdapter:
    """A LoRA adapter apart from its model: of each layer that it changes, A, B and the scale of their product. Without
    layers it is the model as it is."""

    layers: dict[torch.nn.Module, tuple[torch.nn.Linear, torch.nn.Linear, float]] = field(default_factory=dict)


class MixedAdapters:
    """Several `LoraAdapter`s of one model, each of which changes its own tokens of a pass: y + scale × B A x (Chen et
    al. 2023, arXiv:2310.18547)."""

    def __init__(self, adapters: Sequence[LoraAdapter]) -> None:
        self._layers = {layer for adapter in adapters for layer in adapter.layers}
        self.modules = [part for adapter in adapters for a, b, _ in adapter.layers.values() for part in (a, b)]
        self._tokens: list[tuple[LoraAdapter, torch.Tensor | None]] = []

    def choose(self, tokens: Mapping[LoraAdapter, torch.Tensor | None]) -> None:
        """Which tokens `[n]` of the coming passes, by their places, each adapter changes; None for all."""
        self._tokens = list(tokens.items())

    @contextmanager
    def used(self) -> Generator[None]:
        """Inside, the model's layers have the adapters beside them."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(self._add).remove)
            yield

    def _add(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        for adapter, tokens in self._tokens:
            if (found := adapter.layers.get(layer)) is None:
                continue
            a, b, scale = found
            if tokens is None:
                output = output + b(a(x)) * scale
            else:
                output.index_add_(-2, tokens, b(a(x.index_select(-2, tokens))) * scale)
        return output


@dataclass(frozen=True)
class Base:
    """Weights and how they are held in memory: models for which it is equal can share them."""

    sha256: str
    config: str
    precision: Precision
    four_bits: bool
    name: str = field(compare=False)

    def load(self) -> LoadedModel:
        """Them in memory. Raises as `load_model` does."""
        return load.load_model(self.name, self.precision, four_bits=self.four_bits)


def shared_base(name: str, precision: Precision | None = None) -> Base | None:
    """What the model called `name` can share with others, in `precision` or in the one that `load_model` would choose:
    its weights or, for a plain LoRA adapter, those below it. None for an adapter that has to have a model of its own.
    Raises as `locate` does."""
    from peft import PeftConfig

    below = location = locate_model(name)
    origin = read_origin(location.path)
    if (location.path / "adapter_config.json").is_file():
        if not _is_plain_lora(location.path, PeftConfig.from_pretrained(str(location.path))):
            return None
        below = locate_model(load.base_of(location.path, origin))
        if (below.path / "adapter_config.json").is_file():
            return None
    sha256 = weights_sha256(below.path)
    if origin.get("base_sha256", sha256) != sha256:
        return None  # `load_model` says what is wrong with it
    if precision is None:
        stored = origin.get("precision") == "float32"
        precision = "float32" if stored else load.faster_precision(load.default_device())
    about = below.path / "config.json"
    text = about.read_text(encoding="utf-8") if about.is_file() else ""  # a .gguf file has it inside
    return Base(sha256, text, precision, origin.get("four_bits", False), below.name)


@quiet_transformers()
def load_lora(base: LoadedModel, name: str) -> LoraAdapter | None:
    """The adapter called `name`, which `shared_base` says goes with `base`, which stays as it is; without layers if
    `name` is the base itself. None where its tokenizer has more tokens than the base, or it changes layers that do
    not see every token."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    folder = locate_model(name).path
    if not (folder / "adapter_config.json").is_file():
        return LoraAdapter()
    table: Any = base.causal_lm.get_input_embeddings()
    if len(load.load_tokenizer(name)[0]) > table.weight.shape[0]:
        return None
    model = PeftModel.from_pretrained(base.model, str(folder), autocast_adapter_dtype=False)
    compute_in(model, base.model.dtype)
    found: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    adapter = LoraAdapter(
        {
            layer.get_base_layer(): (layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"])
            for layer in found
        }
    )
    model.unload()
    return adapter if _see_all_tokens(base.causal_lm, adapter.layers) else None


@torch.inference_mode()
def _see_all_tokens(model: PreTrainedModel, layers: Mapping[torch.nn.Module, Any]) -> bool:
    """Whether each of `layers` gets all tokens of a row once and in its order, as far as a pass shows that: an output
    layer gets the last only, and an expert those that are sent to it."""
    ids = torch.arange(1, 14, device=model.device)[None] * 997 % model.config.get_text_config().vocab_size
    seen: Counter[torch.nn.Module] = Counter()

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[layer] += 1 if output.shape[:-1] in ((1, ids.numel()), (ids.numel(),)) else 2

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(count).remove)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return all(seen[layer] == 1 for layer in layers)


def _is_plain_lora(folder: Path, config: Any) -> bool:
    """Whether the adapter in `folder`, with this config, is matrices A and B beside layers, and nothing else."""
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        return False
    plain = LoraConfig()
    names = [each.name for each in fields(config) if each.name not in MAY_DIFFER]
    if any(getattr(config, name) != getattr(plain, name) for name in names):
        return False
    tensors: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors += opened.keys()
    # peft would put what else is there, such as whole embeddings, into the base
    return all(tensor.endswith((".lora_A.weight", ".lora_B.weight")) for tensor in tensors)
