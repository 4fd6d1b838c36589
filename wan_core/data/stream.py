"""The order of training: pack number n is a function of the dataset, the settings, the seed and n, and of nothing else.

Samples are drawn without replacement, epoch after epoch; every window of `buffer_size` draws is packed by itself, and
its packs are shuffled. Data-parallel rank r of d takes the packs r, r + d, r + 2d ...: the order does not depend on how
many ranks or worker processes read it, and a run that resumes on other ranks goes on with the very next pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from wan_core.config import check
from wan_core.flow_matching import stratified_seed
from wan_core.packing import first_fit_decreasing


@dataclass(frozen=True)
class Draw:
    """One sample's turn."""

    source: int  # which dataset of the blend
    index: int  # in its table
    seed: int  # of its noise level and noise, in [0, 2**62)
    drop_caption: bool = False
    sigma: int = 0  # in validation: which of the fixed noise levels


@dataclass(frozen=True)
class Position:
    """A place in the stream: before pack number `pack`. The rest spares a resumed run to pack anew from the start."""

    pack: int = 0
    window: int = 0  # which holds the pack
    first: int = 0  # number of that window's first pack
    draw: int = 0  # where steps are counted in samples or tokens: before this draw, and the rest is 0


@dataclass(frozen=True, eq=False)
class PackStream:
    """The endless sequence of packs."""

    num_tokens: tuple[np.ndarray, ...]  # per dataset [samples], lengths
    weights: tuple[float, ...]  # share of each dataset in the draws, any scale
    tokens_per_pack: int
    buffer_size: int
    caption_dropout: float
    seed: int
    stratified: bool = False  # the noise levels of each step's samples cover all of them evenly
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        count = len(self.num_tokens)
        check(self.buffer_size >= 1, f"dataset.packing_buffer_size={self.buffer_size} is below 1; choose 512")
        check(
            self.buffer_size >= count * (count - 1),
            f"dataset.packing_buffer_size={self.buffer_size} is too small to blend {count} datasets; "
            f"choose {count * (count - 1)} or more",
        )
        check(
            len(self.weights) == count and all(weight > 0 for weight in self.weights),
            f"weights {self.weights} of a blend must be positive, one per dataset",
        )
        for lengths in self.num_tokens:
            first_fit_decreasing([int(lengths.max())], self.tokens_per_pack)  # refuses a sample that fits no pack

    def packs(self, position: Position) -> Iterator[tuple[Position, list[Draw]]]:
        """Packs from a position on, each with the position before it."""
        number, window = position.first, position.window
        while True:
            first = number
            for pack in self.window(window):
                if number >= position.pack:
                    yield Position(number, window, first), pack
                number += 1
            window += 1

    def draws(self, number: int) -> Iterator[Draw]:
        """The samples from draw `number` on, in order, in no packs."""
        window, skipped = divmod(number, self.buffer_size)
        while True:
            yield from self._stratified(self._draws(window), window)[skipped:]
            window, skipped = window + 1, 0

    def window(self, window: int) -> list[list[Draw]]:
        """The packs of one window."""
        draws = self._draws(window)
        lengths = [int(self.num_tokens[draw.source][draw.index]) for draw in draws]
        packs = [[draws[i] for i in pack] for pack in first_fit_decreasing(lengths, self.tokens_per_pack)]
        packs = [packs[i] for i in np.argsort(self._random(len(packs), 2, window), kind="stable")]
        spread = iter(self._stratified(chain.from_iterable(packs), window))
        return [list(islice(spread, len(pack))) for pack in packs]

    def _stratified(self, draws: Iterable[Draw], window: int) -> list[Draw]:
        """A window's draws, in the order in which steps take them: of a step's levels, few lie close together."""
        if not self.stratified:
            return list(draws)
        first = window * self.buffer_size
        return [replace(draw, seed=stratified_seed(draw.seed, number)) for number, draw in enumerate(draws, first)]

    def _draws(self, window: int) -> list[Draw]:
        begins, ends = self._drawn(window), self._drawn(window + 1)
        places = [(k, i) for k, (begin, end) in enumerate(zip(begins, ends, strict=True)) for i in range(begin, end)]
        random = self._random(2 * len(places), 1, window).reshape(-1, 2)
        dropped = random[:, 1] < self.caption_dropout * 2.0**64
        seeds = [int(seed >> 2) for seed in random[:, 0]]
        return [
            Draw(source, self._sample(source, place), seed, bool(drop))
            for (source, place), seed, drop in zip(places, seeds, dropped, strict=True)
        ]

    def _drawn(self, window: int) -> list[int]:
        """How many samples each dataset has given before a window; the heaviest one takes what rounding leaves."""
        total, scale = window * self.buffer_size, sum(self.weights)
        counts = [int(total * (weight / scale)) for weight in self.weights]
        heaviest = self.weights.index(max(self.weights))
        counts[heaviest] += total - sum(counts)
        return counts

    def _sample(self, source: int, place: int) -> int:
        """The sample at a place of a dataset's own endless order."""
        epoch, place = divmod(place, len(self.num_tokens[source]))
        if (source, epoch) not in self._orders:
            self._orders.pop((source, epoch - 2), None)
            random = self._random(len(self.num_tokens[source]), 0, source, epoch)
            self._orders[source, epoch] = np.argsort(random, kind="stable")
        return int(self._orders[source, epoch][place])

    def _random(self, count: int, *purpose: int) -> np.ndarray:
        """Uniform uint64 [count]. Of numpy's random numbers only raw ones stay the same in later versions."""
        return np.random.Philox(np.random.SeedSequence([self.seed, *purpose])).random_raw(count)
