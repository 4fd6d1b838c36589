"""Pixels to normalised latents and back, through diffusers' AutoencoderKLWan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan_core.config import VAE_TEMPORAL_STRIDE

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and a run whose stages are all cached needs none
    from diffusers import AutoencoderKLWan


class Vae:
    """A frozen AutoencoderKLWan with the normalisation of its latents; untiled, as WAN 2.1 was trained."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model.eval().requires_grad_(False)
        shape = (1, model.config.z_dim, 1, 1, 1)
        self.mean = torch.tensor(model.config.latents_mean, device=model.device).view(shape)  # float32
        self.std = torch.tensor(model.config.latents_std, device=model.device).view(shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Posterior mean, normalised per channel in float32.

        Args:
            video: [B, 3, T, H, W] in [-1, 1], T = 4n+1, H and W multiples of 8.

        Returns:
            float32 [B, 16, (T - 1) / 4 + 1, H / 8, W / 8] on the VAE's device.

        Raises:
            ValueError: T is not 4n+1; the VAE would drop the last frames without a word.
        """
        if video.shape[2] % VAE_TEMPORAL_STRIDE != 1:
            raise ValueError(f"video has {video.shape[2]} frames, which is not 4n+1; cut it to such a length")
        video = video.to(self.model.device, self.model.dtype)
        mean = self.model.encode(video).latent_dist.mode()
        return (mean.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, t, h, w] to float32 video [B, 3, 4 * (t - 1) + 1, 8 * h, 8 * w] in [-1, 1]."""
        latents = latents.to(self.model.device, torch.float32) * self.std + self.mean
        return self.model.decode(latents.to(self.model.dtype)).sample.float().clamp(-1, 1)


def load_vae(model_dir: Path, dtype: torch.dtype, device: torch.device | str) -> Vae:
    """The VAE of a Diffusers folder."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(model_dir, subfolder="vae", torch_dtype=dtype, local_files_only=True)
    return Vae(model.to(device))
