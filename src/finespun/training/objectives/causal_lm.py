"""Next-token prediction with a weight for each token: the loss of a packed batch.

Only hidden states whose target has a weight go through the head, so a prompt costs no vocabulary product.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel

from finespun.data.packing import PackedBatch
from finespun.data.templates import TokenizedExample
from finespun.files import seed_of
from finespun.models.adapters import has_soft_prompt, head_weight, soft_prompt_cache
from finespun.models.attention import packed, packs_exactly, plan_packing
from finespun.models.linear_cross_entropy import accumulation_type, capped, linear_cross_entropy, rows_of_chunk
from finespun.models.load import compute_in


@dataclass(frozen=True)
class BatchLoss:
    """`weighted_sum` is Σ weight × loss over the batch, in nats, with its gradient; `losses` `[trained]` are the losses
    of the tokens that have a weight, `weights` `[trained]` these weights, `examples` `[trained]` whose they are."""

    weighted_sum: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor
    examples: torch.Tensor


class EmbeddingNoise:
    """Noise on the embeddings of a step's examples (NEFTune, Jain et al. 2023, arXiv:2310.05914): uniform in ±alpha /
    √(tokens × dim) for each number of an example. It is a function of seed, step and example, whatever it is computed
    together with."""

    def __init__(self, alpha: float, seed: int, step: int) -> None:
        self._alpha, self._seed, self._step = alpha, seed, step

    def __call__(self, examples: Sequence[TokenizedExample], dim: int) -> torch.Tensor:
        """`[tokens, dim]` for `examples` end to end."""
        return torch.cat([self._of(example, dim) for example in examples])

    def _of(self, example: TokenizedExample, dim: int) -> torch.Tensor:
        seed = seed_of([self._seed, self._step, str(example.origin), example.input_ids.tolist()])
        generator = torch.Generator().manual_seed(seed)
        size = (len(example.input_ids), dim)
        return (torch.rand(size, generator=generator) * 2 - 1) * self._alpha / (size[0] * dim) ** 0.5


class CausalLM:
    """The objective for one model, a `PreTrainedModel` or a `PeftModel` around one.

    Whether it can be packed and whether its logits are a linear function of its hidden states is tried out once, here;
    where either is not so, `why_slow` says it and each example is computed by itself through the model's own forward
    pass."""

    def __init__(self, model: Any) -> None:
        self.outer = model
        self.model: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
        self.decoder: torch.nn.Module = self.model.base_model
        self.head = self.model.get_output_embeddings()
        self.logit_softcap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        self.why_slow: str | None = None
        if has_soft_prompt(model):
            self.why_slow = "a soft prompt stands before each of them"
        elif self.decoder is self.model or head_weight(self.head) is None or not self._head_is_all():
            self.why_slow = "its logits are not a plain product of its hidden states"
        elif not packs_exactly(self.model, self.decoder):
            self.why_slow = "its attention cannot be packed exactly"

    def __call__(self, batch: PackedBatch, loss_scale: float = 1.0, noise: torch.Tensor | None = None) -> BatchLoss:
        """The loss of `batch`; all weights are multiplied by `loss_scale` first, and `noise` `[tokens, dim]` is added
        to the embeddings."""
        trained = batch.loss_weights.nonzero().squeeze(1)
        weights = batch.loss_weights[trained] * loss_scale
        targets = batch.targets[trained]
        examples = torch.searchsorted(batch.cu_seqlens, trained, right=True) - 1
        if self.why_slow:
            losses = cross_entropy(self._logits_one_by_one(batch, noise)[trained], targets, reduction="none")
            return BatchLoss((losses * weights).sum(), losses.detach(), weights, examples)
        with self._with_noise(noise):
            hidden = self.hidden_states(batch, input_ids=batch.input_ids[None])
        matrix = head_weight(self.head)
        assert matrix is not None  # else this model is a slow one
        weighted_sum, losses = linear_cross_entropy(
            hidden[trained], matrix, targets, weights, getattr(self.head, "bias", None), self.logit_softcap
        )
        return BatchLoss(weighted_sum, losses, weights, examples)

    @torch.no_grad()
    def logits(self, batch: PackedBatch, places: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits behind the tokens at `places` of a packed row, in pieces `[tokens, vocab]` of as many as are held
        at a time; float32 or wider."""
        if self.why_slow:
            yield self._logits_one_by_one(batch, None)[places]
            return
        matrix = head_weight(self.head)
        assert matrix is not None  # else this model is a slow one
        hidden = self.hidden_states(batch, input_ids=batch.input_ids[None])[places]
        for part in hidden.split(rows_of_chunk(matrix)):
            logits = linear(part, matrix, getattr(self.head, "bias", None)).to(accumulation_type(hidden.dtype))
            yield capped(logits, self.logit_softcap) if self.logit_softcap else logits

    def computing_in(self, dtype: torch.dtype) -> CausalLM:
        """Itself, or a copy in another type to measure with: the optimizer takes its masters from the model itself."""
        if self.model.dtype == dtype:
            return self
        other = CausalLM(compute_in(deepcopy(self.outer), dtype))
        other.why_slow = self.why_slow  # as for the run itself, which was asked before it was converted
        return other

    def packing(self) -> AbstractContextManager[None]:
        """Inside, the model takes packed rows."""
        return nullcontext() if self.why_slow else packed(self.model)

    def hidden_states(self, batch: PackedBatch, **inputs: torch.Tensor) -> torch.Tensor:
        """`[tokens, dim]`, what the model makes of a packed row; `inputs` are its `input_ids` or `inputs_embeds`."""
        with self.packing():
            output = self.decoder(
                position_ids=batch.position_ids[None],
                packing=plan_packing(batch.cu_seqlens),
                use_cache=False,
                **inputs,
            )
        return output.last_hidden_state[0]

    def _logits_one_by_one(self, batch: PackedBatch, noise: torch.Tensor | None) -> torch.Tensor:
        parts = []
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            prompt = soft_prompt_cache(self.outer, rows=1)
            cache = {"use_cache": False} if prompt is None else {"past_key_values": prompt[0], "use_cache": True}
            with self._with_noise(None if noise is None else noise[start:end]):
                logits = self.model(input_ids=batch.input_ids[None, start:end], **cache).logits[0]
            parts.append(logits.to(accumulation_type(logits.dtype)))
        return torch.cat(parts)

    @contextmanager
    def _with_noise(self, noise: torch.Tensor | None) -> Generator[None]:
        """Inside, `noise` is added to the embeddings of what the model reads."""
        if noise is None:
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: output + noise.to(output.device, output.dtype)
        )
        try:
            yield
        finally:
            hook.remove()

    @property
    def embedding_dim(self) -> int:
        """Numbers in the embedding of a token."""
        table: Any = self.model.get_input_embeddings()
        return table.embedding_dim

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        """Whether the model's logits are what the head makes of the decoder's hidden states, or that soft-capped as the
        config says. The head's output is replaced by large numbers on the way, so that whatever the model does with it
        shows."""
        device = next(self.model.parameters()).device
        ids = torch.arange(9, device=device)[None] % self.model.config.vocab_size
        seen: list[torch.Tensor] = []
        made: list[torch.Tensor] = []

        def replace(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            seen.append(inputs[0])
            made.append(torch.linspace(-99, 99, output.numel(), device=device, dtype=output.dtype).view_as(output))
            return made[0]

        hook = self.head.register_forward_hook(replace)
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if not made:
            return False
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        expected = capped(made[0], self.logit_softcap) if self.logit_softcap else made[0]
        return hidden.shape == seen[0].shape and torch.allclose(hidden, seen[0]) and torch.allclose(logits, expected)
