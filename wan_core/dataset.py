"""The dataset section of a training config: what Bridge builds its iterators from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

from wan_core.config import check
from wan_core.data.blend import dataset_path
from wan_core.data.loader import LoaderConfig, PackLoader
from wan_core.data.synthetic import SyntheticConfig, SyntheticLoader
from wan_core.parallel import Parallel


@dataclass(kw_only=True)
class WanDatasetProvider(DatasetProvider):
    """Packs from an indexed dataset, or synthetic ones where `mock` says so; never one for want of the other."""

    path: str | None = None  # output of the index stage, or a blend of several
    tokens_per_pack: int = 37440
    packing_buffer_size: int = 64  # samples among which packs are filled
    shuffle_buffer_size: int = 256
    caption_dropout: float = 0.1  # taken from flow_matching.caption_dropout
    mock: bool = False
    mock_shapes: tuple[str, ...] = SyntheticConfig().shapes
    mock_text_dim: int = 4096
    dataloader_type: str = "external"  # type: ignore[assignment]
    num_workers: int = 2
    persistent_workers: bool = False

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Train and validation iterators of this data-parallel rank.

        Raises:
            ValueError: no dataset was given, or it is not indexed.
        """
        parallel = Parallel.current()
        rank, ranks, validates = parallel.dp_rank, parallel.dp, context.valid_samples > 0
        if self.mock:
            mock = SyntheticConfig(shapes=self.mock_shapes, text_dim=self.mock_text_dim)
            validation = SyntheticLoader(mock.validation(), rank, ranks) if validates else None
            return SyntheticLoader(mock, rank, ranks), validation, None
        check(self.path is not None, "no dataset: give dataset.path=DIR (the index stage's output), or --mock")
        config = LoaderConfig(
            str(dataset_path(Path(str(self.path)))), self.tokens_per_pack, self.packing_buffer_size,
            self.shuffle_buffer_size, self.caption_dropout, self.num_workers,
        )  # fmt: skip
        group = context.pg_collection.dp if context.pg_collection else None
        train = PackLoader(config, "train", rank, ranks, group)
        return train, PackLoader(config, "val", rank, ranks, group) if validates else None, None
