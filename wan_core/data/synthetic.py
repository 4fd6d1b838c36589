"""Random latents and text of chosen shapes: for benchmarks, for tests of the layouts, and for `--mock`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from wan_core.config import STRICT, check
from wan_core.data.batch import Pack, TrainingSample, random_seed


@dataclass(frozen=True)
class SyntheticConfig:
    """Every pack holds one sample of each shape."""

    shapes: tuple[str, ...] = ("24x104x60",)  # latent frames x height x width; the default has 37,440 tokens
    channels: int = 16
    text_dim: int = 4096
    text_length: int = 128
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
            key = f"{number:08d}-{index}"
            identity = {"__key__": key, "__restore_key__": (), "__subflavors__": {}}
            samples.append(TrainingSample(**identity, latents=latents, text_embeds=text, seed=random_seed(generator)))
        return Pack.of(samples)


class SyntheticLoader:
    """Endless packs: data-parallel rank r of n gets numbers r, r + n, r + 2n ..."""

    def __init__(self, config: SyntheticConfig, rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size, self.step = config, rank, world_size, 0

    def __iter__(self) -> SyntheticLoader:
        return self

    def __next__(self) -> Pack:
        pack = self.config.pack(self.step * self.world_size + self.rank)
        self.step += 1
        return pack

    def save_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
