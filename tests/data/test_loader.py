"""The order of training data: exact under any number of ranks and workers, and from any place on."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.resume.data import TEXT_DIM, make_dataset
from wan_core.data import blend
from wan_core.data.loader import LoaderConfig, PackLoader, ValidationPlan, dropped_text, train_loader
from wan_core.data.stream import Draw, PackStream, Position
from wan_core.data.table import SampleTable

Turn = tuple[tuple[str, int, int], ...]  # key, seed and text length of each sample of a pack


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("loader"), 40)


def config(path: Path, num_workers: int = 0) -> LoaderConfig:
    return LoaderConfig(str(path), 40, 11, 0.3, num_workers, seed=7)


def turns(loader: PackLoader, count: int) -> list[Turn]:
    packs = [next(loader) for _ in range(count)]
    return [
        tuple(zip(pack.keys, pack.seeds, (text.shape[0] for text in pack.text_embeds), strict=True)) for pack in packs
    ]


def all_turns(path: Path, ranks: int, start: Position, steps: int) -> tuple[list[Turn], Position]:
    """`steps` packs of every rank, in the order of the stream, and the position behind them."""
    loaders = [train_loader(config(path), rank, ranks, start) for rank in range(ranks)]
    found = [turn for _ in range(steps) for loader in loaders for turn in turns(loader, 1)]
    return found, loaders[0].position


def test_the_order_does_not_depend_on_ranks_or_on_where_a_run_resumed(dataset: Path) -> None:
    whole, _ = all_turns(dataset, 1, Position(), 60)
    found, place = [], Position()
    for ranks, steps in ((2, 6), (4, 3), (1, 5), (3, 7), (2, 5), (1, 0)):
        more, place = all_turns(dataset, ranks, place, steps)
        found += more
        assert place.pack == len(found)
    assert found == whole[: len(found)]


def test_stratified_levels_spread_over_each_step() -> None:
    """Of the n samples that a step takes, in packs or in a number of samples, no level is further from the next than
    2 / n on the circle of levels; and nothing else of a sample changes."""
    lengths = (np.random.default_rng(0).integers(4, 30, 50),)
    plain, spread = (PackStream(lengths, (1.0,), 90, 40, 0.3, 7, stratified) for stratified in (False, True))
    by_pack = [pack for _, pack in islice(spread.packs(Position()), 40)]
    samples = iter(spread.draws(0))
    for step in (*by_pack, *(list(islice(samples, 16)) for _ in range(40))):
        levels = sorted((draw.seed >> 30) / 2**32 for draw in step)
        gaps = [after - before for before, after in zip(levels, [*levels[1:], levels[0] + 1], strict=True)]
        assert max(gaps) <= 2 / len(levels)
    assert max(map(len, by_pack)) > 4

    def rest(draws: Iterable[Draw]) -> list[Draw]:
        return [replace(draw, seed=draw.seed % 2**30) for draw in draws]

    assert list(map(rest, by_pack)) == [rest(pack) for _, pack in islice(plain.packs(Position()), 40)]
    assert rest(islice(spread.draws(0), 100)) == rest(islice(plain.draws(0), 100))


def test_a_place_without_its_window_is_found(dataset: Path) -> None:
    whole, _ = all_turns(dataset, 1, Position(), 60)
    assert all_turns(dataset, 1, Position(pack=41), 19)[0] == whole[41:]


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own(dataset: Path) -> None:
    table = SampleTable.read(dataset, "train")
    keys = [key for turn in all_turns(dataset, 1, Position(), 80)[0] for key, _, _ in turn]
    counts = Counter(keys)
    assert set(counts) == set(table.keys) and max(counts.values()) - min(counts.values()) <= 2
    seeds = [seed for turn in all_turns(dataset, 1, Position(), 80)[0] for _, seed, _ in turn]
    assert len(set(seeds)) == len(seeds)


def test_captions_are_dropped_at_their_share(dataset: Path) -> None:
    lengths = [length for turn in all_turns(dataset, 1, Position(), 200)[0] for _, _, length in turn]
    assert abs(sum(length == 1 for length in lengths) / len(lengths) - 0.3) < 0.06


def test_dropped_captions_may_become_the_negative_prompt(dataset: Path, tmp_path: Path) -> None:
    loader = train_loader(replace(config(dataset), dropped_caption="negative"), 0, 1, Position())
    plain = train_loader(config(dataset), 0, 1, Position())
    dropped = 0
    for pack, other in ((next(loader), next(plain)) for _ in range(40)):
        for text, same in zip(pack.text_embeds, other.text_embeds, strict=True):
            assert torch.equal(text, torch.ones(2, TEXT_DIM) if same.shape[0] == 1 else same)
            dropped += same.shape[0] == 1
    assert dropped > 5
    with pytest.raises(
        ValueError, match=r"negative_text.pt does not exist, which .* set flow_matching.dropped_caption"
    ):
        dropped_text(tmp_path, "negative")


def test_workers_change_nothing(dataset: Path) -> None:
    loader = train_loader(config(dataset, num_workers=2), 1, 2, Position())
    assert turns(loader, 9) == turns(train_loader(config(dataset), 1, 2, Position()), 9)
    assert loader.position.pack == 18
    pack, table = next(loader), SampleTable.read(dataset, "train")
    for key, latents, text in zip(pack.keys, pack.latents, pack.text_embeds, strict=True):
        members = table.load(list(table.keys).index(key))
        assert torch.equal(latents, members["pth"])
        assert torch.equal(text, members["pickle"]) or torch.equal(text, torch.zeros(1, text.shape[1]))


def test_reading_draws_nothing_from_torchs_generator(dataset: Path) -> None:
    """A resumed run starts a loader once more than an unbroken one."""
    before = torch.get_rng_state()
    turns(train_loader(config(dataset, num_workers=1), 0, 1, Position()), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dead_worker_is_an_error(dataset: Path) -> None:
    loader = train_loader(config(dataset, num_workers=1), 0, 1, Position())
    turns(loader, 1)
    worker = loader._packs._workers[0]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"DataLoader worker.*(killed|exited)"):
        os.kill(worker.pid, signal.SIGKILL)
        try:
            turns(loader, 50)
        finally:
            worker.join()  # torch raises out of a signal handler, which must not happen behind this block


def test_a_signal_to_a_ranks_process_group_spares_its_readers(dataset: Path) -> None:
    """As torchrun sends it: the rank saves, and takes packs until then."""
    if (rank := os.fork()) == 0:
        try:
            os.setpgid(0, 0)
            loader = train_loader(config(dataset, num_workers=1), 0, 1, Position())
            turns(loader, 1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)
            turns(loader, 50)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(rank, 0)[1] == 0


def test_a_damaged_sample_is_a_sentence(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, 12)
    table = SampleTable.read(path, "train")
    with (path / table.shards[0]).open("r+b") as shard:
        shard.seek(int(table.offsets[0] + 512 * 3))
        shard.write(bytes(3000))
    with pytest.raises(ValueError, match=r"^(sample|shard member|found) .*(again)"):
        turns(train_loader(config(path, num_workers=1), 0, 1, Position()), 30)
    (path / table.shards[0]).unlink()
    with pytest.raises(ValueError, match="is gone; run shard and index again"):
        turns(train_loader(config(path), 0, 1, Position()), 30)


def test_side_info_that_lies_about_the_length_is_refused(dataset: Path) -> None:
    table = SampleTable.read(dataset, "train")
    loader = train_loader(config(dataset), 0, 1, Position())
    loader._loader.dataset.tables = [replace(table, num_tokens=table.num_tokens + 1)]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"its side-info says .*; encode its source again"):
        next(loader)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path / "none", "none does not exist"),
        (lambda path: path, "is empty; give the folder that the index stage wrote"),
        (lambda path: [path.joinpath("x").write_text(""), path][1], "holds no Energon metadata"),
        (
            lambda path: [path.joinpath("x.yaml").write_text("a: 1"), path / "x.yaml"][1],
            "has no `splits: train: blend:` of datasets",
        ),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        train_loader(config(make(tmp_path)), 0, 1, Position())


def test_a_split_without_samples_is_refused(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, 8, val_share=0.0)
    with pytest.raises(ValueError, match=r"has no val samples; .* set validation.eval_interval=0"):
        ValidationPlan.of(config(path), (0.5,), 8, 1)


def test_a_blend_keeps_its_weights_in_every_window(dataset: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", 16, val_share=0.0)
    blend.run({dataset: 3.0, other: 1.0}, tmp_path / "blend")
    loader = train_loader(config(tmp_path / "blend"), 0, 1, Position())
    draws = [draw for pack in islice(_stream(loader), 200) for draw in pack]
    share = sum(draw.source for draw in draws) / len(draws)
    assert abs(share - 0.25) < 0.01
    stream = PackStream((np.full(5, 4), np.full(9, 4)), (1.0, 3.0), 40, 8, 0.0, 0)
    for window in range(6):
        assert Counter(draw.source for pack in stream.window(window) for draw in pack) == {0: 2, 1: 6}
    first, second = (turns(train_loader(config(tmp_path / "blend"), 0, 1, Position()), 30) for _ in range(2))
    assert first == second


def _stream(loader: PackLoader):
    return (draws for draws in loader._loader.sampler)


def test_validation_shows_each_sample_at_each_noise_level(dataset: Path) -> None:
    sigmas, table = (0.1, 0.5, 0.9), SampleTable.read(dataset, "val")
    plan = ValidationPlan.of(config(dataset), sigmas, 5, 4)
    assert len(plan.packs) % 4 == 0
    seen: Counter[tuple[str, float]] = Counter()
    seeds: dict[str, set[int]] = {}
    for rank in range(2):
        loader = plan.loader(rank, 2, 0)
        first, again = ([next(loader) for _ in range(len(plan.packs) // 2)] for _ in range(2))
        assert [(p.keys, p.seeds, p.sigmas, p.counts) for p in first] == [
            (p.keys, p.seeds, p.sigmas, p.counts) for p in again
        ]
        for pack in (pack for pack in first if pack.counts):
            assert pack.sigmas is not None
            seen.update(zip(pack.keys, pack.sigmas, strict=True))
            for key, seed in zip(pack.keys, pack.seeds, strict=True):
                seeds.setdefault(key, set()).add(seed)
    assert seen == {(key, sigma): 1 for key in sorted(table.keys)[:5] for sigma in sigmas}
    assert all(len(found) == 1 for found in seeds.values()) and len(set().union(*seeds.values())) == 5


def test_a_sample_that_fits_no_pack_is_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match="exceeds the pack's budget of 5"):
        train_loader(replace(config(dataset), tokens_per_pack=5), 0, 1, Position())


def test_random_numbers_stay_the_same_over_versions() -> None:
    """A run that resumes with a newer numpy must find its data in the same order."""
    stream = PackStream((np.arange(3, 12),), (1.0,), 20, 4, 0.5, 3)
    assert stream.window(2) == STORED


STORED = [
    [Draw(0, 6, 525059919684135464), Draw(0, 3, 3430566330184711872), Draw(0, 2, 1809536441753787948)],
    [Draw(0, 0, 4019624455337613481, drop_caption=True)],
]
