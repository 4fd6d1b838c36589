"""Flow matching: the straight path from data to noise, and the velocity along it.

Lipman et al., "Flow Matching for Generative Modeling" (arXiv:2210.02747); timestep densities and shift from Esser et
al., "Scaling Rectified Flow Transformers" (arXiv:2403.03206, sections 3.1 and 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from wan_core.config import STRICT, check

NUM_TRAIN_TIMESTEPS = 1000  # timesteps = 1000 * sigma
GOLDEN = 2654435769  # 2**32 / the golden ratio


@dataclass(frozen=True)
class FlowMatchingConfig:
    """How noise levels are drawn and the loss is weighted."""

    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    uniform_share: float = 0.0  # this share of samples is drawn uniformly whatever the density
    shift: float = 3.0
    stratified: bool = False  # spread consecutive samples evenly over the noise levels, see `stratified_seed`
    weighting: Literal["none", "sigma_sqrt"] = "none"
    caption_dropout: float = 0.1  # share of samples trained on another caption than theirs; guidance needs it
    dropped_caption: Literal["empty", "negative"] = "empty"  # or the negative prompt of the encode stage
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.shift > 0, f"flow_matching.shift={self.shift} is not positive; choose 3.0")
        check(self.logit_std > 0, f"flow_matching.logit_std={self.logit_std} is not positive; choose 1.0")
        for name in ("uniform_share", "caption_dropout"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"flow_matching.{name}={value} is not a share; choose a value in [0, 1]")

    @classmethod
    def for_mode(cls, mode: Literal["pretrain", "finetune"]) -> FlowMatchingConfig:
        """The presets of the training modes: broad noise levels for pretraining, uniform ones for finetuning."""
        if mode == "pretrain":
            return cls(density="logit_normal", logit_std=1.5, uniform_share=0.1, shift=2.5)
        return cls(density="uniform", logit_std=1.0, shift=3.0)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sigmas_from_uniform(config: FlowMatchingConfig, uniform: Tensor, choice: Tensor) -> Tensor:
    """Noise levels in (0, 1) by inverse transform, so that stratified uniforms give stratified sigmas.

    Args:
        uniform: [n] in (0, 1), float64.
        choice: [n] in (0, 1); below `uniform_share` the density is uniform.
    """
    if config.density == "logit_normal":
        drawn = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform))
    elif config.density == "mode":
        drawn = 1 - uniform - config.mode_scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)
    else:
        drawn = uniform
    return shift_sigmas(torch.where(choice < config.uniform_share, uniform, drawn), config.shift)


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """noisy_latents = (1 - sigma) * latents + sigma * noise, all in float32."""
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """The path's derivative, which the model predicts: noise - latents."""
    return noise - latents


def loss_weights(config: FlowMatchingConfig, sigmas: Tensor) -> Tensor:
    """Weight per sample: 1, or 1 / sigma^2 clipped at 25 for `sigma_sqrt`."""
    if config.weighting == "sigma_sqrt":
        return sigmas.clamp(min=0.2) ** -2.0
    return torch.ones_like(sigmas)


@dataclass(frozen=True)
class Noised:
    """One sample on its way to noise."""

    noisy_latents: Tensor  # [C, T, H, W] float32
    velocity: Tensor  # [C, T, H, W] float32
    sigma: Tensor  # [] float32


def stratified_seed(seed: int, number: int) -> int:
    """A sample's seed whose noise level is low-variance: consecutive numbers spread evenly over all levels.

    The level follows from the seed's upper 32 bits. Here these are the additive recurrence with the golden ratio,
    whose every run of n terms leaves no gap above 1.9 / n on the circle: a global batch covers the levels whatever its
    size and however its samples are packed. The lower 30 bits, of which the noise depends too, stay.

    Args:
        seed: in [0, 2**62).
        number: the sample's turn in the run's order.
    """
    return (number * GOLDEN % 2**32) << 30 | seed % 2**30


def draw_sigmas(config: FlowMatchingConfig, seeds: Sequence[int]) -> Tensor:
    """Each sample's noise level, a function of its seed in [0, 2**62) alone: [n] float32 on the CPU."""
    levels = torch.tensor([seed >> 30 for seed in seeds], dtype=torch.float64)
    choices = torch.tensor([seed % 2**30 for seed in seeds], dtype=torch.float64)
    return sigmas_from_uniform(config, (levels + 0.5) / 2**32, (choices + 0.5) / 2**30).float()


def draw_noise(shapes: Sequence[torch.Size], seeds: Sequence[int], device: torch.device) -> list[Tensor]:
    """Standard normal noise of each shape, a function of the sample's seed alone; float32."""
    ends = [0, *accumulate(shape.numel() for shape in shapes)]
    flat = torch.empty(ends[-1], device=device)
    generator = torch.Generator(device)
    for begin, end, seed in zip(ends, ends[1:], seeds, strict=False):
        flat[begin:end].normal_(generator=generator.manual_seed(seed))
    return [part.view(shape) for part, shape in zip(flat.split(list(map(math.prod, shapes))), shapes, strict=True)]


def add_noise(config: FlowMatchingConfig, latents: Tensor, seed: int) -> Noised:
    """Draw sigma and noise for latents [C, T, H, W] from a seed of the sample's own.

    The seed travels with the sample, so every layout of ranks, every pack and every resumed run draws the same.
    """
    sigma = draw_sigmas(config, [seed])[0].to(latents.device)
    (noise,) = draw_noise([latents.shape], [seed], latents.device)
    latents = latents.float()
    return Noised(interpolate(latents, noise, sigma), velocity(latents, noise), sigma)
