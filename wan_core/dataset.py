"""The dataset section of a training config: what Bridge builds its iterators from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.data.loader import LoaderConfig, ValidationPlan, sources, train_loader
from wan_core.data.shards import ENCODER_NAME
from wan_core.data.steps import BatchUnit, check_place
from wan_core.data.stream import Position
from wan_core.data.synthetic import SyntheticConfig, SyntheticLoader, SyntheticValidation
from wan_core.data.table import SampleTable
from wan_core.parallel import Parallel


@dataclass(kw_only=True)
class WanDatasetProvider(DatasetProvider):
    """Packs from an indexed dataset, or synthetic ones where `mock` says so; never one for want of the other."""

    path: str | None = None  # output of the index stage, or a blend of several
    tokens_per_pack: int = 37440
    packing_buffer_size: int = 512  # samples among which packs are filled
    caption_dropout: float = 0.1  # taken from flow_matching.caption_dropout
    dropped_caption: str = "empty"  # taken from flow_matching.dropped_caption
    seed: int = 1234  # taken from rng.seed
    stratified: bool = False  # taken from flow_matching.stratified
    batch_unit: BatchUnit = "packs"  # what train.global_batch_size counts
    batch_size: int = 1  # taken from train.global_batch_size
    validation_sigmas: tuple[float, ...] = ()  # taken from the validation section, as the next two
    validation_samples: int = 0
    validation_packs_per_step: int = 1
    mock: bool = False
    mock_shapes: tuple[str, ...] = SyntheticConfig().shapes
    mock_text_dim: int = 4096
    mock_image_dim: int = 0  # above 0: of the first frames' embeddings, for image-to-video
    dataloader_type: str = "external"  # type: ignore[assignment]
    num_workers: int = 2
    persistent_workers: bool = False

    # No fields, because they are no settings: so typed in comments.
    start = Position()  # where training goes on
    loader = None  # type: Any  # of training, once it is built

    def loader_config(self) -> LoaderConfig:
        check(self.path is not None, "no dataset: give dataset.path=DIR (the index stage's output), or --mock")
        return LoaderConfig(
            str(self.path), self.tokens_per_pack, self.packing_buffer_size, self.caption_dropout, self.num_workers,
            self.seed, self.stratified, self.batch_unit, self.batch_size,
            self.dropped_caption,
        )  # fmt: skip

    def check(self, architecture: Architecture) -> None:
        """Raises `ValueError` where there is no training data for a model to find, before anything slow begins."""
        check(
            not self.mock or self.batch_unit == "packs",
            f"dataset.batch_unit={self.batch_unit} needs a dataset; --mock makes whole packs, so set packs",
        )
        if not self.mock:
            for folder, _ in sources(Path(self.loader_config().path), "train"):
                SampleTable.read(folder, "train")
                encoder = json.loads((folder / ENCODER_NAME).read_text(encoding="utf-8"))
                architecture.check_first_frames("image_encoder" in encoder, folder)

    def validation_plan(self) -> ValidationPlan:
        """Raises `ValueError` where there is no val split."""
        return ValidationPlan.of(
            self.loader_config(), self.validation_sigmas, self.validation_samples, self.validation_packs_per_step
        )

    @property
    def num_validation_packs(self) -> int:
        """How many packs one validation takes; a multiple of those of one step."""
        if self.mock:
            return -(-self.validation_samples // self.validation_packs_per_step) * self.validation_packs_per_step
        return len(self.validation_plan().packs)

    def go_on_from(self, place: Position) -> None:
        """Start training at a place in the data; raises `ValueError` where it was counted otherwise."""
        check_place(place, self.batch_unit)
        self.start = place

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Train and validation iterators of this data-parallel rank.

        Raises:
            ValueError: no dataset was given, or it is not indexed.
        """
        parallel = Parallel.current()
        rank, ranks, validates = parallel.dp_rank, parallel.dp, context.valid_samples > 0
        if self.mock:
            mock = SyntheticConfig(
                shapes=self.mock_shapes, text_dim=self.mock_text_dim, image_dim=self.mock_image_dim
            )  # fmt: skip
            fixed = (self.validation_sigmas, self.num_validation_packs, rank, ranks)
            self.loader = SyntheticLoader(mock, rank, ranks, self.start)
            return self.loader, SyntheticValidation(mock.validation(), *fixed) if validates else None, None
        validation = self.validation_plan().loader(rank, ranks, self.num_workers) if validates else None
        self.loader = train_loader(self.loader_config(), rank, ranks, self.start)
        return self.loader, validation, None
