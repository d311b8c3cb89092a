"""Token sequences → PackedBatches. Token ids and weights only; nothing about text, files or models.

A batch is several examples end to end in one row without padding. `cu_seqlens` tells the attention where each one
begins, positions restart with each, and the target of an example's last token has weight 0: no example sees another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finespun.data.templates import TokenizedExample


@dataclass(frozen=True)
class PackedBatch:
    """Examples end to end.

    `input_ids`, `position_ids`, `targets` (the next token of the same example) and `loss_weights` (of that target)
    are `[tokens]`; `cu_seqlens` `[examples + 1]` holds where each example starts, and the end.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`."""
        return PackedBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack(examples: Sequence[TokenizedExample]) -> PackedBatch:
    """One batch of `examples`, in their order."""
    lengths = [len(example.input_ids) for example in examples]
    return PackedBatch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        targets=torch.tensor([token for example in examples for token in (*example.input_ids[1:], 0)]),
        loss_weights=torch.tensor(
            [weight for example in examples for weight in (*example.loss_weights[1:], 0.0)], dtype=torch.float32
        ),
    )


def micro_batches(examples: Sequence[TokenizedExample], max_tokens: int) -> list[list[TokenizedExample]]:
    """`examples` in groups of at most `max_tokens` tokens; an example longer than that is a group of its own.

    Sorted by length first: attention computes examples of similar length together, so alike ones belong together.
    """
    groups: list[list[TokenizedExample]] = []
    room = 0
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        if not groups or len(example.input_ids) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(example)
        room -= len(example.input_ids)
    return groups


def step_indices(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """For each step from `start` on, without end, the examples of it: each epoch is a new permutation of all `count`,
    and its last step has what is left. A pure function of its arguments, so that a resumed run goes on exactly."""
    steps_per_epoch = -(-count // batch_size)
    epoch, step = divmod(start, steps_per_epoch)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()
        for first in range(step * batch_size, count, batch_size):
            yield order[first : first + batch_size]
        epoch, step = epoch + 1, 0
