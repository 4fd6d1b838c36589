"""Several samples in one sequence. Attention sees the boundaries (cu_seqlens); nothing else mixes tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.config import IMAGE_LENGTH, TEXT_LENGTH, check
from wan_core.patch import GridSize


@dataclass(frozen=True)
class Segments:
    """Boundaries of the queries and keys that belong together, for variable-length attention."""

    q_lengths: tuple[int, ...]  # of each segment; 0 is allowed
    k_lengths: tuple[int, ...]
    last_key_counts: tuple[int, ...] | None = None  # each segment's last key stands for so many equal ones; None: 1

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative lengths of queries and keys, int32 [segments + 1] each."""
        return _cumulative(self.q_lengths, device), _cumulative(self.k_lengths, device)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    total = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return total.to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """Which samples a packed sequence holds, and which of its tokens this rank works on.

    The sequence is the samples' tokens in order, then padding up to a length that divides by the ranks. Padding is a
    segment of its own in self-attention, borrows the last sample's modulation and text, and carries no loss.
    """

    grids: tuple[GridSize, ...]
    text_lengths: tuple[int, ...]  # true lengths, 1 to 512
    num_tokens: int  # padding included
    start: int = 0  # this rank's tokens are [start, stop)
    stop: int = -1  # set to num_tokens when left at -1

    def __post_init__(self) -> None:
        assert self.num_tokens >= self.num_real_tokens > 0, (self.num_tokens, self.num_real_tokens)
        assert len(self.text_lengths) == len(self.grids), (self.text_lengths, self.grids)
        assert all(1 <= length <= TEXT_LENGTH for length in self.text_lengths), self.text_lengths
        if self.stop < 0:
            object.__setattr__(self, "stop", self.num_tokens)

    @classmethod
    def of(cls, grids: Sequence[GridSize], texts: Sequence[Tensor], multiple: int = 1) -> Packing:
        """Pack samples of these grids and texts [n, text_dim], padded to a multiple of the ranks that share it."""
        real = sum(grid.num_tokens for grid in grids)
        return cls(tuple(grids), tuple(text.shape[0] for text in texts), -(-real // multiple) * multiple)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(grid.num_tokens for grid in self.grids)

    @property
    def num_samples(self) -> int:
        return len(self.grids)

    @property
    def num_real_tokens(self) -> int:
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_local_tokens(self) -> int:
        return self.stop - self.start

    def part(self, index: int, of: int) -> Packing:
        """The contiguous `index`-th of `of` equal parts of this rank's tokens."""
        size, rest = divmod(self.num_local_tokens, of)
        assert rest == 0, (self.num_local_tokens, of)
        begin = self.start + index * size
        return replace(self, start=begin, stop=begin + size)

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """How many of this rank's tokens use each sample's modulation and text; padding uses the last one's."""
        lengths = (*self.lengths[:-1], self.lengths[-1] + self.num_tokens - self.num_real_tokens)
        inside, position = [], 0
        for length in lengths:
            begin, end = max(position, self.start), min(position + length, self.stop)
            inside.append(max(0, end - begin))
            position += length
        return tuple(inside)

    @cached_property
    def self_segments(self) -> Segments:
        """Self-attention over the whole sequence."""
        padding = self.num_tokens - self.num_real_tokens
        lengths = (*self.lengths, padding) if padding else self.lengths
        return Segments(lengths, lengths)

    @cached_property
    def cross_segments(self) -> Segments:
        """Cross-attention of this rank's tokens to each sample's text: all 512 positions, unmasked.

        The positions behind a text are alike, so one row stands for all of them, see `pack_text`.
        """
        rows = tuple(min(length + 1, TEXT_LENGTH) for length in self.text_lengths)
        return Segments(self.local_lengths, rows, tuple(TEXT_LENGTH + 1 - count for count in rows))

    @cached_property
    def image_segments(self) -> Segments:
        """Cross-attention of this rank's tokens to each sample's image."""
        return Segments(self.local_lengths, (IMAGE_LENGTH,) * self.num_samples)

    def sample_index(self, device: torch.device) -> Tensor:
        """Which sample's modulation each of this rank's tokens uses, int64 [local tokens]."""
        counts = torch.tensor(self.local_lengths)
        return torch.repeat_interleave(torch.arange(self.num_samples), counts).to(device, non_blocking=True)

    def loss_mask(self, device: torch.device) -> Tensor:
        """1 for this rank's real tokens, 0 for padding, float32 [local tokens]."""
        return (torch.arange(self.start, self.stop) < self.num_real_tokens).float().to(device, non_blocking=True)


def pack_text(texts: Sequence[Tensor]) -> Tensor:
    """Texts [n, text_dim] as one sequence, each followed by one row of zeros that stands for its padding to 512.

    WAN attends to the padding, so it must count as often as it occurs; it need not be computed as often.
    """
    return torch.cat([F.pad(text, (0, 0, 0, int(text.shape[0] < TEXT_LENGTH))) for text in texts])


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group samples into packs of at most `budget` tokens: longest first, each into the first pack that has room.

    Returns:
        Indices into `lengths`, one list per pack.

    Raises:
        ValueError: a single sample exceeds the budget.
    """
    longest = max(lengths, default=0)
    check(
        longest <= budget,
        f"a sample of {longest} tokens exceeds the pack's budget of {budget}; "
        f"set dataset.tokens_per_pack to {longest} or more, or encode smaller videos",
    )
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((i for i, free in enumerate(room) if free >= lengths[index]), len(packs))
        if slot == len(packs):
            packs.append([])
            room.append(budget)
        packs[slot].append(index)
        room[slot] -= lengths[index]
    return packs


def spread(lengths: Sequence[int], budget: int, multiple: int) -> list[list[int]]:
    """Spread samples over packs of about equal length: the fewest, a multiple of `multiple`, that keep to the budget.

    Longest first, each into the emptiest pack. No length may exceed the budget; packs are empty where samples are few.

    Returns:
        Indices into `lengths`, one list per pack.
    """
    count = multiple * max(1, -(-sum(lengths) // (budget * multiple)))
    while True:
        packs: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, slot) for slot in range(count)]
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            load, slot = loads[0]
            packs[slot].append(index)
            heapq.heapreplace(loads, (load + lengths[index], slot))
        if max(loads)[0] <= budget:
            return packs
        count += multiple
