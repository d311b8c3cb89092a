"""Token sequences → PackedBatches. Token ids and weights only; nothing about text, files or models.

A batch is several examples end to end in one row without padding. `cu_seqlens` tells the attention where each one
begins, positions restart with each, and the target of an example's last token has weight 0: no example sees another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finespun.data.templates import TokenizedExample
from finespun.data.tokens import Share
from finespun.files import seed_of


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
    ends = np.cumsum([len(example.input_ids) for example in examples])
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    weights = np.concatenate([example.loss_weights for example in examples])
    # what an example's last token would predict is the next example's first
    targets, target_weights = np.roll(ids, -1), np.roll(weights, -1)
    targets[ends - 1], target_weights[ends - 1] = 0, 0.0
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.cat([torch.arange(len(example.input_ids)) for example in examples]),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends])),
        targets=torch.from_numpy(targets),
        loss_weights=torch.from_numpy(target_weights),
    )


def micro_batches(examples: Sequence[TokenizedExample], max_tokens: int) -> list[list[TokenizedExample]]:
    """`examples` in groups of at most `max_tokens` tokens, filled by best fit: each example, the longest first, goes
    where the least room is left behind. An example longer than `max_tokens` is a group of its own.

    Best-fit decreasing packs to within 11/9 of the fewest groups possible (Johnson 1974), and examples as short as
    those of most data sets to within a percent or two.
    """
    groups: list[list[TokenizedExample]] = []
    rooms: list[tuple[int, int]] = []  # sorted by room: (room left, group)
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        at = bisect_left(rooms, (length, 0))
        if at == len(rooms):
            groups.append([])
            room, group = max_tokens, len(groups) - 1
        else:
            room, group = rooms.pop(at)
        groups[group].append(example)
        insort(rooms, (room - length, group))
    return groups


def step_indices(
    count: int, batch_size: int, seed: int, start: int = 0, mixture: Sequence[Share] = ()
) -> Iterator[list[int]]:
    """For each step from `start` on, without end, the examples of it: each epoch is a new permutation of all `count`,
    and its last step has what is left. With a `mixture`, an epoch takes from each source as many as its share says;
    one source's examples come equally often in the long run. A pure function of its arguments, so that a resumed run
    goes on exactly."""
    shares = mixture or [Share(0, count, count)]
    size = sum(share.draws for share in shares)
    epoch, step = divmod(start, -(-size // batch_size))
    while True:
        drawn = [index for number, share in enumerate(shares) for index in _drawn(share, number, epoch, seed)]
        order = torch.randperm(size, generator=_generator(seed, epoch)).tolist() if mixture else range(size)
        for first in range(step * batch_size, size, batch_size):
            yield [drawn[index] for index in order[first : first + batch_size]]
        epoch, step = epoch + 1, 0


def _drawn(share: Share, source: int, epoch: int, seed: int) -> Iterator[int]:
    """What an epoch takes of a source: the next piece of an endless row of permutations of its examples."""
    count = share.end - share.first
    position, end = epoch * share.draws, (epoch + 1) * share.draws
    while position < end:
        cycle, offset = divmod(position, count)
        order = torch.randperm(count, generator=_generator(seed + source, cycle))
        piece = order[offset : offset + end - position]
        yield from (piece + share.first).tolist()
        position += len(piece)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of([seed, number]))
