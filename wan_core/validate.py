"""How well a model predicts held-out clips: the flow-matching loss at fixed noise levels and with fixed noise.

The same clips give the same number on every run, so two models can be compared by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from wan_core.data.samples import first_frame_of
from wan_core.data.table import SampleTable
from wan_core.first_frame import FirstFrame, behind, pack_first_frames
from wan_core.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    FlowMatchingConfig,
    interpolate,
    sigmas_from_uniform,
    velocity,
)
from wan_core.packing import Packing, pack_text
from wan_core.patch import GridSize, patchify, patchify_output

NUM_LEVELS = 5  # noise levels per clip: mid-points of as many equal shares of fine-tuning's distribution
MAX_CLIPS = 256


@dataclass(frozen=True)
class Validation:
    """A model's loss on the `val` split of a dataset."""

    loss: float  # mean over clips and noise levels
    losses: tuple[float, ...]  # per noise level, rising
    sigmas: tuple[float, ...]
    num_clips: int


def held_out(dataset: Path) -> Iterator[tuple[str, Tensor, Tensor, FirstFrame | None]]:
    """Key, latents [C, T, H, W], text embeddings [n, text_dim] and first frame (of an image-to-video dataset) of the
    clips in an index's `val` split."""
    table = SampleTable.read(dataset, "val")
    for index, key in enumerate(table.keys):
        members = table.load(index)
        yield str(key), members["pth"], members["pickle"], first_frame_of(members)


def noise_for(key: str, latents: Tensor) -> Tensor:
    """float32 noise that follows from a clip's key, drawn on the CPU: the same on every device."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)


def run(model: Path, dataset: Path, device: str | None = None) -> Validation:
    """The loss of a Diffusers folder's transformer.

    Raises:
        ValueError: the dataset has no `val` split.
    """
    from wan_core.inference import loaded_transformer

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    uniform = (torch.arange(NUM_LEVELS, dtype=torch.float64) + 0.5) / NUM_LEVELS
    sigmas = sigmas_from_uniform(FlowMatchingConfig.for_mode("finetune"), uniform, torch.ones_like(uniform))
    losses: list[list[float]] = []
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with loaded_transformer(model, None, dtype, place) as transformer:
        for key, stored, text, frame in islice(held_out(dataset), MAX_CLIPS):
            transformer.config.architecture.check_first_frames(frame is not None, dataset)
            given, image_embeds = pack_first_frames([frame.to(place)] if frame else [])
            latents = stored.to(place).float()
            noise, packing = noise_for(key, latents), Packing.of([GridSize.of(latents)], [text])
            rows, target = pack_text([text]).to(place), patchify_output(velocity(latents, noise))
            row = []
            for sigma in sigmas.tolist():
                timesteps = torch.full((1,), sigma * NUM_TRAIN_TIMESTEPS, dtype=torch.float64, device=place)
                patches = behind(patchify(interpolate(latents, noise, sigma)), given)
                predicted = transformer(patches, timesteps, rows, packing, image_embeds)
                row.append((predicted.float() - target).square().mean().item())
            losses.append(row)
    means = torch.tensor(losses, dtype=torch.float64).mean(0)
    return Validation(float(means.mean()), tuple(means.tolist()), tuple(sigmas.tolist()), len(losses))
