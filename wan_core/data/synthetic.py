"""Random latents and text of chosen shapes: for benchmarks, for tests of the layouts, and for `--mock`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from wan_core.config import IMAGE_LENGTH, STRICT, check
from wan_core.data.batch import Pack, TrainingSample, random_seed
from wan_core.data.stream import Position
from wan_core.first_frame import FirstFrame


@dataclass(frozen=True)
class SyntheticConfig:
    """Every pack holds one sample of each shape."""

    shapes: tuple[str, ...] = ("24x104x60",)  # latent frames x height x width; the default has 37,440 tokens
    channels: int = 16
    text_dim: int = 4096
    text_length: int = 128
    image_dim: int = 0  # above 0: with first frames, for image-to-video
    seed: int = 0
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for shape in self.shapes:
            sizes = shape.split("x")
            check(
                len(sizes) == 3 and all(s.isdigit() and int(s) > 0 for s in sizes),
                f"mock shape {shape!r} is not FRAMESxHEIGHTxWIDTH in latents; write for example 21x60x104",
            )

    def validation(self) -> SyntheticConfig:
        """Other packs of the same shapes."""
        return replace(self, seed=self.seed + 1)

    def pack(self, number: int) -> Pack:
        """The pack of this number; the same on every rank that asks for it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        samples = []
        for index, shape in enumerate(self.shapes):
            latents = torch.randn(self.channels, *map(int, shape.split("x")), generator=generator)
            text = torch.randn(self.text_length, self.text_dim, generator=generator)
            key, seed, frame = f"{number:08d}-{index}", random_seed(generator), None
            if self.image_dim:
                embeds = torch.randn(IMAGE_LENGTH, self.image_dim, generator=generator)
                frame = FirstFrame(torch.randn(latents.shape, generator=generator), embeds)
            identity = {"__key__": key, "__restore_key__": (), "__subflavors__": {}}
            sample = TrainingSample(**identity, latents=latents, text_embeds=text, seed=seed, first_frame=frame)
            samples.append(sample)
        return Pack.of(samples)


class SyntheticLoader:
    """Endless packs: data-parallel rank r of n gets numbers start + r, start + r + n, start + r + 2n ..."""

    def __init__(self, config: SyntheticConfig, rank: int, world_size: int, start: Position = Position()) -> None:
        self.config, self.rank, self.world_size, self.position = config, rank, world_size, start

    def __iter__(self) -> SyntheticLoader:
        return self

    def __next__(self) -> Pack:
        pack = self.config.pack(self.position.pack + self.rank)
        self.position = Position(self.position.pack + self.world_size)
        return pack


class SyntheticValidation:
    """The first `num_packs` packs, over and over, their samples at the fixed noise levels in turn."""

    def __init__(
        self, config: SyntheticConfig, sigmas: Sequence[float], num_packs: int, rank: int, world_size: int
    ) -> None:
        self.config, self.sigmas = config, sigmas
        self.numbers = cycle(range(rank, num_packs, world_size))

    def __iter__(self) -> SyntheticValidation:
        return self

    def __next__(self) -> Pack:
        number = next(self.numbers)
        pack = self.config.pack(number)
        first = number * len(pack.latents)
        pack.sigmas = [self.sigmas[(first + i) % len(self.sigmas)] for i in range(len(pack.latents))]
        return pack
