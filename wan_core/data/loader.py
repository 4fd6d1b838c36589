"""One data-parallel rank's packs, read ahead by worker processes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wan_core.config import check
from wan_core.data.batch import Pack, TrainingSample
from wan_core.data.blend import METADATASET_NAME, members_of
from wan_core.data.index import META_FOLDER
from wan_core.data.samples import first_frame_of
from wan_core.data.steps import BatchUnit, StepStream, Turn, pack_turns
from wan_core.data.stream import Draw, PackStream, Position
from wan_core.data.table import SampleTable
from wan_core.packing import first_fit_decreasing
from wan_core.signals import outlive_sigterm, sigterm_blocked


@dataclass(frozen=True)
class LoaderConfig:
    """How packs are made from shards."""

    path: str  # output of the index stage, a blend of several, or an Energon metadataset's YAML
    tokens_per_pack: int
    packing_buffer_size: int
    caption_dropout: float
    num_workers: int
    seed: int
    stratified: bool = False
    batch_unit: BatchUnit = "packs"  # of a step's size, `batch_size`
    batch_size: int = 1  # not used where packs are counted
    dropped_caption: str = "empty"  # empty or negative

    def __post_init__(self) -> None:
        check(
            self.batch_unit in get_args(BatchUnit),
            f"dataset.batch_unit={self.batch_unit!r} is none of packs, samples and tokens; choose one",
        )


def sources(path: Path, split: str) -> list[tuple[Path, float]]:
    """The datasets behind a path, and their weights.

    Raises:
        ValueError: there is nothing, or the YAML is no blend of datasets.
    """
    check(path.exists(), f"dataset.path={path} does not exist; give the folder that the index stage wrote")
    if path.is_dir() and not (path / METADATASET_NAME).is_file():
        check(any(path.iterdir()), f"dataset.path={path} is empty; give the folder that the index stage wrote")
        check(
            (path / META_FOLDER / "dataset.yaml").is_file(),
            f"dataset.path={path} holds no Energon metadata ({META_FOLDER}/dataset.yaml); run the index stage on it, "
            "or give the folder that it wrote",
        )
        return [(path, 1.0)]
    if path.is_dir():
        members_of(path)  # refuses a blend whose members have changed
        path = path / METADATASET_NAME
    description = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = (description or {}).get("splits", {}).get(split, {}).get("blend", [])
    check(
        bool(entries) and all("path" in entry for entry in entries),
        f"dataset.path={path} has no `splits: {split}: blend:` of datasets with path and weight; run `wan blend`, "
        "or give the folder that the index stage wrote",
    )
    return [(path.parent / entry["path"], float(entry.get("weight", 1.0))) for entry in entries]


KEPT_BYTES = 64 << 20  # a dataset below this is decoded once: small samples cost 2 ms each, whatever their size


class _Packs(Dataset[Any]):
    """Reads the samples of a pack; runs in the workers. What is damaged comes back as a value, without a traceback."""

    def __init__(
        self, tables: Sequence[SampleTable], dropped_text: Tensor, sigmas: Sequence[float] = (),
        stand_in: Sequence[Draw] = (),
    ) -> None:  # fmt: skip
        self.tables, self.dropped_text, self.sigmas, self.stand_in = tables, dropped_text, sigmas, stand_in
        small = sum(int(table.sizes.sum()) for table in tables) <= KEPT_BYTES
        self.load = cache(self._load) if small else self._load  # in each worker

    def __getitem__(self, draws: Sequence[Draw]) -> Pack | ValueError:
        chosen = draws or self.stand_in
        try:
            pack = Pack.of([self.sample(draw) for draw in chosen])
        except ValueError as error:
            return error
        pack.counts = len(draws) > 0
        if self.sigmas:
            pack.sigmas = [self.sigmas[draw.sigma] for draw in chosen]
        return pack

    def _load(self, source: int, index: int) -> dict[str, Any]:
        return self.tables[source].load(index)

    def sample(self, draw: Draw) -> TrainingSample:
        table = self.tables[draw.source]
        key, members = str(table.keys[draw.index]), self.load(draw.source, draw.index)
        sample = TrainingSample(
            __key__=key, __restore_key__=(), latents=members["pth"], seed=draw.seed,
            text_embeds=self.dropped_text if draw.drop_caption else members["pickle"],
            first_frame=first_frame_of(members),
        )  # fmt: skip
        planned = int(table.num_tokens[draw.index])
        check(
            sample.num_tokens == planned,
            f"sample {key!r} of {table.folder} has latents of {sample.num_tokens} tokens, but its side-info says "
            f"{planned}; encode its source again",
        )
        return sample


class PackLoader:
    """Packs of one data-parallel rank, without end."""

    def __init__(
        self, dataset: _Packs, turns: Iterator[Turn], start: Position = Position(), num_workers: int = 0
    ) -> None:
        self.position = start  # of all ranks together, behind the last pack that this rank handed out
        self._issued: deque[Turn] = deque()  # packs on their way
        self._loader = DataLoader(
            dataset, batch_size=None, sampler=_noted(turns, self._issued), num_workers=num_workers,
            collate_fn=_unchanged, worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),  # its own: a draw from torch's would part a resumed run from a whole one
        )  # fmt: skip
        self._packs: Iterator[Pack | ValueError] | None = None
        self._ahead: tuple[Pack, Turn] | None = None

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        """Raises `ValueError` where a sample is damaged, `RuntimeError` where a worker has died."""
        (pack, turn), self._ahead = self._ahead or self._read(), None
        self.position = turn.behind
        return pack

    def packs_in_step(self) -> int:
        """How many packs this rank has in the step to come, whose first one is read for that."""
        self._ahead = self._ahead or self._read()
        return self._ahead[1].packs_in_step

    def _read(self) -> tuple[Pack, Turn]:
        if self._packs is None:
            with sigterm_blocked():
                self._packs = iter(self._loader)
        try:
            pack = next(self._packs)
        except (ConnectionError, EOFError) as error:  # torch notices most deaths itself, but not during the handover
            raise RuntimeError(f"DataLoader worker exited while it handed a pack over: {error!r}") from error
        if isinstance(pack, ValueError):
            raise pack
        return pack, self._issued.popleft()


def _noted(turns: Iterator[Turn], issued: deque[Turn]) -> Iterator[list[Draw]]:
    """What each turn reads. A method would close a cycle, and workers that a collected cycle leaves take 5 s to end."""
    for turn in turns:
        issued.append(turn)
        yield turn.draws


def _outlive_sigterm(worker: int) -> None:
    outlive_sigterm()


def _unchanged(pack: Any) -> Any:  # either a pack or a ValueError
    return pack


def train_loader(config: LoaderConfig, rank: int, world_size: int, start: Position) -> PackLoader:
    """This rank's training packs from a position on.

    Raises:
        ValueError: the dataset is missing, not indexed, empty, or has a sample that exceeds a pack.
    """
    found = sources(Path(config.path), "train")
    tables = [SampleTable.read(folder, "train") for folder, _ in found]
    stream = PackStream(
        tuple(table.num_tokens for table in tables), tuple(weight for _, weight in found), config.tokens_per_pack,
        config.packing_buffer_size, config.caption_dropout, config.seed, config.stratified,
    )  # fmt: skip
    if config.batch_unit == "packs":
        turns = pack_turns(stream, start, rank, world_size)
    else:
        turns = StepStream(stream, config.batch_unit, config.batch_size).turns(start, rank, world_size)
    shortest = min((int(t.num_tokens.min()), source, int(t.num_tokens.argmin())) for source, t in enumerate(tables))
    packs = _Packs(tables, dropped_text(found[0][0], config.dropped_caption), stand_in=[Draw(*shortest[1:], seed=0)])
    return PackLoader(packs, turns, start, config.num_workers)


@dataclass(frozen=True)
class ValidationPlan:
    """A fixed set of packs: the first samples of the val split by key, each at every sigma, noised by its key."""

    tables: tuple[SampleTable, ...]
    packs: tuple[tuple[Draw, ...], ...]  # an empty one stands in where the ranks' shares would be unequal
    sigmas: tuple[float, ...]
    dropped_text: Tensor  # [n, text_dim]; validation drops no caption

    @classmethod
    def of(cls, config: LoaderConfig, sigmas: Sequence[float], max_samples: int, packs_per_step: int) -> ValidationPlan:
        """Raises `ValueError` where there is no val split."""
        found = sources(Path(config.path), "val")
        tables = tuple(SampleTable.read(folder, "val") for folder, _ in found)
        named = [(str(key), source, i) for source, table in enumerate(tables) for i, key in enumerate(table.keys)]
        draws = [
            Draw(source, index, seed=_key_seed(key), sigma=number)
            for key, source, index in sorted(named)[:max_samples]
            for number in range(len(sigmas))
        ]
        lengths = [int(tables[draw.source].num_tokens[draw.index]) for draw in draws]
        packs = [tuple(draws[i] for i in pack) for pack in first_fit_decreasing(lengths, config.tokens_per_pack)]
        packs += [()] * (-len(packs) % packs_per_step)
        return cls(tables, tuple(packs), tuple(sigmas), dropped_text(found[0][0], "empty"))

    def loader(self, rank: int, world_size: int, num_workers: int) -> PackLoader:
        """This rank's share, over and over."""
        packs = _Packs(self.tables, self.dropped_text, self.sigmas, self.packs[0])
        turns = (Turn(list(draws), Position()) for draws in islice(cycle(self.packs), rank, None, world_size))
        return PackLoader(packs, turns, num_workers=min(num_workers, 1))


def _key_seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 2


def dropped_text(folder: Path, caption: str) -> Tensor:
    """What stands in the place of dropped captions, [n, text_dim].

    Raises:
        ValueError: the dataset holds no embedding of a negative prompt.
    """
    path = folder / f"{caption}_text.pt"
    check(
        path.is_file(),
        f"{path} does not exist, which flow_matching.dropped_caption={caption} needs; encode the videos again (what "
        "encode.negative_prompt says), or set flow_matching.dropped_caption=empty",
    )
    return torch.load(path, weights_only=True)
