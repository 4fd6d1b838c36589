"""What the data pipeline hands to a training step."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from megatron.energon import Sample, edataclass
from torch import Tensor

from wan_core.first_frame import FirstFrame


@edataclass
class TrainingSample(Sample):
    """One clip as it enters a pack."""

    latents: Tensor  # [C, T, H, W]
    text_embeds: Tensor  # [n <= 512, text_dim], the true length; the empty caption's where the caption is dropped
    seed: int  # draws the sample's noise level and noise
    first_frame: FirstFrame | None = None  # for image-to-video

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.latents.shape[-3:]
        return frames * (height // 2) * (width // 2)


@edataclass
class Pack(Sample):
    """Samples that share one sequence."""

    keys: list[str]  # of the samples
    latents: list[Tensor]  # [C, T, H, W] each
    text_embeds: list[Tensor]  # [n <= 512, text_dim] each
    seeds: list[int]
    first_frames: list[FirstFrame] = field(default_factory=list)  # of each sample, or none for text-to-video
    sigmas: list[float] | None = None  # in validation: given noise levels; in training each follows from its seed
    counts: bool = True  # False: it only keeps a rank in step with the others, and no loss is taken of it

    def __getstate__(self) -> dict[str, Any]:
        """Lists of tensors as one tensor each: a worker process hands each tensor over by a file descriptor."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        frames = [frame.latents for frame in self.first_frames], [frame.embeds for frame in self.first_frames]
        flat = {"latents": _flat(self.latents), "text_embeds": _flat(self.text_embeds)}
        return state | flat | {"first_frames": tuple(map(_flat, frames))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        latents, embeds = (_parts(*flat) for flat in state["first_frames"])
        lists = {name: _parts(*state[name]) for name in ("latents", "text_embeds")}
        for name, value in (state | lists | {"first_frames": list(map(FirstFrame, latents, embeds))}).items():
            setattr(self, name, value)

    @classmethod
    def of(cls, samples: list[TrainingSample]) -> Pack:
        """Pack samples in order."""
        return cls.derive_from(
            samples[0], keys=[s.__key__ for s in samples], latents=[s.latents for s in samples],
            text_embeds=[s.text_embeds for s in samples], seeds=[s.seed for s in samples],
            first_frames=[s.first_frame for s in samples if s.first_frame],
        )  # fmt: skip


def _flat(tensors: list[Tensor]) -> tuple[list[torch.Size], Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.empty(0)
    return [tensor.shape for tensor in tensors], flat


def _parts(shapes: list[torch.Size], flat: Tensor) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]


def random_seed(generator: torch.Generator | None = None) -> int:
    """A sample's seed, drawn from torch's (or the given) generator."""
    return int(torch.randint(2**62, (), generator=generator))
