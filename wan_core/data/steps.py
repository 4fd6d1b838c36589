"""Steps of so many samples or tokens, where packs do not count.

A step takes the next samples of the order, and spreads them evenly over as few packs as hold them and divide by the
data-parallel ranks. What a step trains on does not depend on how many ranks there are or how much a pack holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from wan_core.config import check
from wan_core.data.stream import Draw, PackStream, Position
from wan_core.packing import spread

BatchUnit = Literal["packs", "samples", "tokens"]


@dataclass(frozen=True)
class Turn:
    """One rank's next pack."""

    draws: list[Draw]  # empty: it only keeps the rank in step with the others
    behind: Position  # of all ranks together, once the pack is handed out
    packs_in_step: int = 0  # of this rank, where the pack is a step's first and steps do not count packs


def pack_turns(stream: PackStream, start: Position, rank: int, ranks: int) -> Iterator[Turn]:
    """Packs `rank`, `rank` + `ranks`, ... behind the start."""
    for number, (place, draws) in enumerate(islice(stream.packs(start), rank, None, ranks), 1):
        yield Turn(draws, Position(start.pack + number * ranks, place.window, place.first))


@dataclass(frozen=True)
class StepStream:
    """The endless sequence of steps."""

    stream: PackStream
    unit: BatchUnit  # but packs
    size: int  # of a step: so many samples, or as many as come before there are more tokens

    def __post_init__(self) -> None:
        longest = max(int(lengths.max()) for lengths in self.stream.num_tokens)
        check(
            self.unit == "samples" or longest <= self.size,
            f"a sample of {longest} tokens exceeds train.global_batch_size={self.size}, which counts tokens; "
            f"set it to {longest} or more",
        )

    def steps(self, draw: int) -> Iterator[list[Draw]]:
        """The samples of each step, from a draw on."""
        step: list[Draw] = []
        taken = 0
        for sample in self.stream.draws(draw):
            cost = 1 if self.unit == "samples" else self._length(sample)
            if taken + cost > self.size:
                yield step
                step, taken = [], 0
            step.append(sample)
            taken += cost

    def turns(self, start: Position, rank: int, ranks: int) -> Iterator[Turn]:
        """A rank's packs; every rank has equally many in each step."""
        place = start.draw
        for step in self.steps(place):
            place += len(step)
            packs = spread([self._length(sample) for sample in step], self.stream.tokens_per_pack, ranks)
            mine = packs[rank::ranks]
            for number, pack in enumerate(mine):
                yield Turn([step[i] for i in pack], Position(draw=place), 0 if number else len(mine))

    def _length(self, sample: Draw) -> int:
        return int(self.stream.num_tokens[sample.source][sample.index])


def check_place(place: Position, unit: BatchUnit) -> None:
    """Refuse to go on from a place in the data that counts packs with steps that do not, and the other way round.

    Raises:
        ValueError: says with which unit the run can go on.
    """
    in_packs = unit == "packs"
    other = "samples or tokens" if in_packs else "packs"
    check(
        place == Position() or in_packs == (place.draw == 0),
        f"dataset.batch_unit={unit}, but the checkpoint's place in the data was counted in {other}; resume with "
        f"dataset.batch_unit={other}, or choose another run folder",
    )
