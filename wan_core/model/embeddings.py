"""Timesteps and text to what the blocks are conditioned on."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.model.config import WanTransformerConfig
from wan_core.model.ops import AffineLayerNorm


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """cos, then sin, of timesteps [n] in [0, 1000], computed in float64; returns [n, dim] float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=timesteps.device))
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class TimeEmbedding(nn.Module):
    """Timesteps to the head's embedding and the blocks' modulation; float32 throughout."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        h = config.hidden_size
        place: dict[str, Any] = {"dtype": torch.float32, "device": config.device}
        self.freq_dim = config.freq_dim
        self.linear_1 = nn.Linear(config.freq_dim, h, **place)
        self.linear_2 = nn.Linear(h, h, **place)
        self.projection = nn.Linear(h, 6 * h, **place)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """[n] -> embedding [n, h], modulation [n, 6, h]."""
        embedding = self.linear_2(F.silu(self.linear_1(sinusoid(timesteps, self.freq_dim))))
        return embedding, self.projection(F.silu(embedding)).unflatten(-1, (6, -1))


class ImageEmbedding(nn.Module):
    """CLIP's embeddings of an image to the model's width; an image-to-video model has one."""

    EPS = 1e-5  # not the model's: diffusers' and WAN's LayerNorms here are torch's default ones

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        width, h, device = config.image_dim, config.hidden_size, config.device
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.input_norm = AffineLayerNorm(width, self.EPS, device)
        self.linear_1 = nn.Linear(width, width, **place)
        self.linear_2 = nn.Linear(width, h, **place)
        self.output_norm = AffineLayerNorm(h, self.EPS, device)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """[image rows, image_dim] -> [image rows, h]."""
        x = self.input_norm(image_embeds.to(self.linear_1.weight.dtype))
        return self.output_norm(self.linear_2(F.gelu(self.linear_1(x))))


class TextEmbedding(nn.Module):
    """Text embeddings to the model's width."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        h = config.hidden_size
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": config.device}
        self.linear_1 = nn.Linear(config.text_dim, h, **place)
        self.linear_2 = nn.Linear(h, h, **place)

    def forward(self, text_embeds: Tensor) -> Tensor:
        """[text rows, text_dim] -> [text rows, h]."""
        x = text_embeds.to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))
