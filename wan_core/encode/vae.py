"""Pixels to normalised latents and back, through AutoencoderKLWan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.config import VAE_TEMPORAL_STRIDE
from wan_core.encode.vae_encoder import MAX_ELEMENTS, FastEncoder
from wan_core.encode.vae_precision import PRECISIONS, allow_tf32, to_float

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and a run whose stages are all cached needs none
    from diffusers import AutoencoderKLWan

PUBLISHED_WIDTH = 96  # channels of the largest activation of WAN's VAE
MAX_BATCH = 16  # clips; more of the small ones are no faster, and would wait for each other

type Shape = tuple[int, int, int]  # T, H, W


def shape_of(frames: Tensor) -> Shape:
    """Of a clip [T, H, W, 3]."""
    return frames.shape[0], frames.shape[1], frames.shape[2]


class Vae:
    """A frozen float32 AutoencoderKLWan with the normalisation of its latents; untiled, as WAN 2.1 was trained.

    Args:
        precision: `float32` encodes with diffusers' own forward, TF32 off: the reference. The others encode with
            `FastEncoder`, whose products are of that type. Decoding is float32 always.
    """

    def __init__(self, model: AutoencoderKLWan, precision: str = "float32") -> None:
        self.model = model.eval().requires_grad_(False)
        self.precision = precision
        self.fast = None if precision == "float32" else FastEncoder(model, PRECISIONS[precision])
        shape = (1, model.config.z_dim, 1, 1, 1)
        self.mean = torch.tensor(model.config.latents_mean, device=model.device).view(shape)  # float32
        self.std = torch.tensor(model.config.latents_std, device=model.device).view(shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Posterior mean, normalised per channel in float32.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8, T = 4n+1, H and W multiples of 8.

        Returns:
            float32 [B, 16, (T - 1) / 4 + 1, H / 8, W / 8] on the VAE's device.

        Raises:
            ValueError: T is not 4n+1; the VAE would drop the last frames without a word.
        """
        if video.shape[2] % VAE_TEMPORAL_STRIDE != 1:
            raise ValueError(f"video has {video.shape[2]} frames, which is not 4n+1; cut it to such a length")
        video = video.to(self.model.device, non_blocking=True)
        mean = self.fast(video.permute(0, 2, 3, 4, 1)) if self.fast else self._reference(video)
        return (mean - self.mean) / self.std

    def batch_size(self, shape: Shape) -> int:
        """How many clips one forward takes.

        In 16 bits on a GPU as many as fit, with their padding, into one chunk of a clip of full size; of longer clips
        one, which fills the GPU. In float32 one: a batch is 5 % faster, and last bits would depend on neighbours.
        """
        if self.precision == "float32" or self.model.device.type == "cpu":
            return 1
        frames, height, width = shape
        padded = (frames + 2) * (height + 2) * (width + 2) * PUBLISHED_WIDTH
        return min(max(MAX_ELEMENTS // padded, 1), MAX_BATCH)

    def check_shape(self, shape: Shape) -> None:
        """Raise `ValueError` if clips of this shape are too large for the kernels."""
        if self.fast and self.model.device.type != "cpu" and not self.fast.fits(*shape):
            raise ValueError(
                f"size {shape[1]}x{shape[2]} is too large for vae_dtype={self.precision}, whose kernels count elements "
                "in 32 bits; choose vae_dtype=float32, or a smaller size"
            )

    def stacked(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips uint8 [T, H, W, 3] of one shape as one video [B, 3, T, H, W] on the VAE's device."""
        return torch.stack([clip.to(self.model.device, non_blocking=True) for clip in clips]).permute(0, 4, 1, 2, 3)

    def encode_first_frame(self, frame: Tensor, num_frames: int) -> Tensor:
        """Latents of a video that is this frame, then grey: what image-to-video models are given.

        Args:
            frame: uint8 [H, W, 3].

        Returns:
            as `encode`, of one video without its batch dimension: [16, (num_frames - 1) / 4 + 1, H / 8, W / 8].
        """
        pixels = to_float(frame.to(self.model.device, non_blocking=True))
        video = F.pad(pixels[None], (0, 0, 0, 0, 0, 0, 0, num_frames - 1))  # [T, H, W, 3]
        return self.encode(video.permute(3, 0, 1, 2)[None])[0]

    @torch.no_grad()
    def error(self, video: Tensor) -> float:
        """|encode(video) - reference| / |reference|, the reference being what `float32` gives."""
        reference = (self._reference(video.to(self.model.device)) - self.mean) / self.std
        return float((self.encode(video) - reference).norm() / reference.norm())

    def _reference(self, video: Tensor) -> Tensor:
        with allow_tf32(False):
            return self.model.encode(to_float(video)).latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, t, h, w] to float32 video [B, 3, 4 * (t - 1) + 1, 8 * h, 8 * w] in [-1, 1]."""
        latents = latents.to(self.model.device, torch.float32) * self.std + self.mean
        return self.model.decode(latents).sample.clamp(-1, 1)


def load_vae(model_dir: Path, precision: str, device: torch.device | str) -> Vae:
    """The VAE of a Diffusers folder."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(
        model_dir, subfolder="vae", torch_dtype=torch.float32, local_files_only=True
    )
    return Vae(model.to(device), precision)
