"""Steps that count samples or tokens: the same samples for any number of ranks, no more and no fewer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.resume.data import make_dataset
from wan_core.data.loader import LoaderConfig, PackLoader, train_loader
from wan_core.data.steps import StepStream, check_place
from wan_core.data.stream import Draw, PackStream, Position
from wan_core.packing import spread

LENGTHS = (np.array([3, 17, 9, 30, 4, 12, 25]), np.array([8, 8, 2]))
STREAM = PackStream(LENGTHS, (2.0, 1.0), 30, 7, 0.1, 5)
UNITS = (("samples", 6), ("tokens", 90))


def tokens(draws: list[Draw]) -> int:
    return sum(int(LENGTHS[draw.source][draw.index]) for draw in draws)


def steps(unit: str, size: int, ranks: int, place: Position, count: int) -> tuple[list[list[Draw]], Position]:
    """The samples of each step, which all ranks together take, and the place behind them."""
    stream = StepStream(STREAM, unit, size)  # type: ignore[arg-type]
    turns = [stream.turns(place, rank, ranks) for rank in range(ranks)]
    found = []
    for _ in range(count):
        first = [next(each) for each in turns]
        assert len({turn.packs_in_step for turn in first}) == 1 and first[0].packs_in_step > 0
        packs = [*first, *(turn for each in turns for turn in islice(each, first[0].packs_in_step - 1))]
        assert len({turn.behind for turn in packs}) == 1 and all(tokens(turn.draws) <= 30 for turn in packs)
        assert [turn.packs_in_step for turn in packs[ranks:]] == [0] * (len(packs) - ranks)
        found.append(sorted((draw for turn in packs for draw in turn.draws), key=lambda draw: draw.seed))
        place = packs[0].behind
    return found, place


@pytest.mark.parametrize(("unit", "size"), UNITS)
def test_a_step_has_the_next_samples_for_any_number_of_ranks(unit: str, size: int) -> None:
    whole, end = steps(unit, size, 1, Position(), 40)
    order = list(islice(STREAM.draws(0), end.draw))
    assert [draw for step in whole for draw in step] == [
        draw
        for begin, step in zip(np.cumsum([0, *map(len, whole)]), whole, strict=False)
        for draw in sorted(order[begin : begin + len(step)], key=lambda draw: draw.seed)
    ]
    found: list[list[Draw]] = []
    place = Position()
    for ranks, count in ((2, 7), (3, 9), (6, 1), (1, 11), (4, 12)):
        more, place = steps(unit, size, ranks, place, count)
        found += more
    assert found == whole and place == end


def test_a_step_is_full_to_the_last_sample() -> None:
    by_samples, _ = steps("samples", 6, 2, Position(), 40)
    assert {len(step) for step in by_samples} == {6}
    by_tokens, end = steps("tokens", 90, 2, Position(), 40)
    order = list(islice(STREAM.draws(0), end.draw + 1))
    behind = np.cumsum([len(step) for step in by_tokens])
    for step, following in zip(by_tokens, behind, strict=True):
        assert tokens(step) <= 90 < tokens(step) + tokens([order[following]])


def test_packs_are_even_and_few() -> None:
    assert sorted(map(len, spread([1] * 10, 100, 4))) == [2, 2, 3, 3]
    assert spread([5], 5, 3) == [[0], [], []]
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 40, generator.integers(1, 30)).tolist()
        packs = spread(lengths, 40, 3)
        loads = [sum(lengths[i] for i in pack) for pack in packs]
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        assert len(packs) % 3 == 0 and max(loads) <= 40 and max(loads) - min(loads) <= max(lengths)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("steps"), 24)


def read(loader: PackLoader, count: int) -> list[list[str]]:
    """Keys of each step that count; `packs_in_step` may be asked at any time between steps."""
    found = []
    for _ in range(count):
        assert loader.packs_in_step() == loader.packs_in_step()
        packs = [next(loader) for _ in range(loader.packs_in_step())]
        found.append([key for pack in packs if pack.counts for key in pack.keys])
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_hands_steps_out(dataset: Path, num_workers: int) -> None:
    config = LoaderConfig(str(dataset), 40, 11, 0.3, num_workers, 7, batch_unit="samples", batch_size=8)
    whole = train_loader(replace(config, num_workers=0), 0, 1, Position())
    one, other = (train_loader(config, rank, 2, Position()) for rank in range(2))
    pairs = zip(read(one, 3), read(other, 3), strict=True)
    assert [Counter(a + b) for a, b in pairs] == [Counter(keys) for keys in read(whole, 3)]
    assert one.position == other.position == whole.position == Position(draw=24)
    next_of_a_resumed_run = read(train_loader(config, 0, 1, one.position), 1)
    assert next_of_a_resumed_run == read(whole, 1)


def test_a_rank_without_samples_keeps_step(dataset: Path) -> None:
    """A step of 10 tokens holds one or two samples, for three ranks."""
    config = LoaderConfig(str(dataset), 40, 11, 0.3, 0, 7, batch_unit="tokens", batch_size=18)
    packs = [next(train_loader(config, rank, 3, Position())) for rank in range(3)]
    assert {pack.counts for pack in packs} == {True, False} and all(pack.latents for pack in packs)


def test_what_cannot_be_counted_is_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"30 tokens exceeds train.global_batch_size=20, which counts tokens; set it"):
        StepStream(STREAM, "tokens", 20)
    with pytest.raises(ValueError, match="'clips' is none of packs, samples and tokens"):
        LoaderConfig(str(dataset), 40, 11, 0.3, 0, 7, batch_unit="clips")  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "place"), [("samples", Position(pack=3)), ("packs", Position(draw=3))])
def test_a_place_that_was_counted_otherwise_is_refused(unit: str, place: Position) -> None:
    with pytest.raises(ValueError, match=r"resume with dataset\.batch_unit="):
        check_place(place, unit)  # type: ignore[arg-type]
