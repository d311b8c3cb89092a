"""Next-token prediction with a weight for each token: the loss of a packed batch.

Only hidden states whose target has a weight go through the head, so a prompt costs no vocabulary product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from finespun.data.packing import PackedBatch
from finespun.models.adapters import head_weight
from finespun.models.attention import packed, packs_exactly, plan_packing
from finespun.models.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class BatchLoss:
    """`weighted_sum` is Σ weight × loss over the batch, in nats, with its gradient; `losses` `[trained]` are the losses
    of the tokens that have a weight, `weights` `[trained]` these weights, `examples` `[trained]` whose they are."""

    weighted_sum: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor
    examples: torch.Tensor


class CausalLM:
    """The objective for one model. Whether the model can be packed and whether its logits are a linear function of its
    hidden states is tried out once, here; where either is not so, `why_slow` says it and each example is computed by
    itself through the model's own forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder: torch.nn.Module = model.base_model
        self.head = model.get_output_embeddings()
        self.why_slow: str | None = None
        if self.decoder is model or head_weight(self.head) is None or not self._head_is_all():
            self.why_slow = "its logits are not a plain product of its hidden states"
        elif not packs_exactly(model, self.decoder):
            self.why_slow = "its attention cannot be packed exactly"

    def __call__(self, batch: PackedBatch, loss_scale: float = 1.0) -> BatchLoss:
        """The loss of `batch`; all weights are multiplied by `loss_scale` first."""
        trained = batch.loss_weights.nonzero().squeeze(1)
        weights = batch.loss_weights[trained] * loss_scale
        targets = batch.targets[trained]
        examples = torch.searchsorted(batch.cu_seqlens, trained, right=True) - 1
        if self.why_slow:
            losses = cross_entropy(self._logits_one_by_one(batch)[trained], targets, reduction="none")
            return BatchLoss((losses * weights).sum(), losses.detach(), weights, examples)
        with packed(self.model):
            hidden = self.decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                packing=plan_packing(batch.cu_seqlens),
                use_cache=False,
            ).last_hidden_state[0]
        matrix = head_weight(self.head)
        assert matrix is not None  # else this model is a slow one
        weighted_sum, losses = linear_cross_entropy(
            hidden[trained], matrix, targets, weights, getattr(self.head, "bias", None)
        )
        return BatchLoss(weighted_sum, losses, weights, examples)

    def _logits_one_by_one(self, batch: PackedBatch) -> torch.Tensor:
        bounds = batch.cu_seqlens.tolist()
        parts = [batch.input_ids[start:end] for start, end in pairwise(bounds)]
        return torch.cat([self.model(input_ids=part[None], use_cache=False).logits[0].float() for part in parts])

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        ids = torch.arange(9, device=next(self.model.parameters()).device)[None] % self.model.config.vocab_size
        logits = self.model(input_ids=ids, use_cache=False).logits
        product = self.head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return torch.allclose(logits.float(), product.float(), rtol=1e-3, atol=1e-3)
