"""An indexed dataset as an endless, savable stream of packs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.errors import reraise_exception

from wan_core.config import check
from wan_core.data.batch import Pack
from wan_core.data.task_encoder import WanTaskEncoder


@dataclass(frozen=True)
class LoaderConfig:
    """How packs are made from shards."""

    path: str  # output of the index stage, or an Energon metadataset beside an empty_text.pt
    tokens_per_pack: int
    packing_buffer_size: int
    shuffle_buffer_size: int
    caption_dropout: float
    num_workers: int

    def __post_init__(self) -> None:
        check(
            Path(self.path).is_file() or (Path(self.path) / ".nv-meta" / "dataset.yaml").is_file(),
            f"dataset.path={self.path} holds no Energon metadata (.nv-meta/dataset.yaml); run the index stage on it, "
            "or give the folder that it wrote",
        )


class PackLoader:
    """Packs of one data-parallel rank, without end; its position can be saved and restored."""

    def __init__(
        self, config: LoaderConfig, split: Literal["train", "val"], rank: int, world_size: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        workers = WorkerConfig(
            rank=rank, world_size=world_size, num_workers=config.num_workers, data_parallel_group=group,
            global_error_handler=reraise_exception,  # by default damaged samples are skipped, with a line in the log
        )  # fmt: skip
        folder = Path(config.path).parent if Path(config.path).is_file() else Path(config.path)
        empty_text = torch.load(folder / "empty_text.pt", weights_only=True)
        dropout = config.caption_dropout if split == "train" else 0.0
        dataset = get_train_dataset(
            config.path, split_part=split, worker_config=workers, batch_size=1,
            task_encoder=WanTaskEncoder(config.tokens_per_pack, dropout, empty_text),
            packing_buffer_size=config.packing_buffer_size, shuffle_buffer_size=config.shuffle_buffer_size,
            max_samples_per_sequence=None,
        )  # fmt: skip
        self._loader = get_savable_loader(dataset)
        self._packs: Iterator[Pack] | None = None

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        if self._packs is None:
            self._packs = iter(self._loader)
        return next(self._packs)

    def save_state(self) -> Any:
        return self._loader.save_state_rank()

    def restore_state(self, state: Any) -> None:
        """Go on behind the pack after which the state was saved. Only before the first pack is read."""
        assert self._packs is None, "restore_state after iteration began"
        self._loader.restore_state_rank(state)
