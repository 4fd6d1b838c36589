"""What the data pipeline hands to a training step."""

from __future__ import annotations

import torch
from megatron.energon import Sample, edataclass
from torch import Tensor


@edataclass
class TrainingSample(Sample):
    """One clip as it enters a pack."""

    latents: Tensor  # [C, T, H, W]
    text_embeds: Tensor  # [n <= 512, text_dim], the true length; the empty caption's where the caption is dropped
    seed: int  # draws the sample's noise level and noise

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.latents.shape[-3:]
        return frames * (height // 2) * (width // 2)


@edataclass
class Pack(Sample):
    """Samples that share one sequence."""

    latents: list[Tensor]  # [C, T, H, W] each
    text_embeds: list[Tensor]  # [n <= 512, text_dim] each
    seeds: list[int]

    @classmethod
    def of(cls, samples: list[TrainingSample]) -> Pack:
        """Pack samples in order."""
        return cls.derive_from(
            samples[0], latents=[s.latents for s in samples], text_embeds=[s.text_embeds for s in samples],
            seeds=[s.seed for s in samples],
        )  # fmt: skip


def random_seed(generator: torch.Generator | None = None) -> int:
    """A sample's seed, drawn from torch's (or the given) generator."""
    return int(torch.randint(2**62, (), generator=generator))
