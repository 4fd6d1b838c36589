"""What an image-to-video model is given beside the text: a video's first frame, as latents and as CLIP sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_core.config import VAE_TEMPORAL_STRIDE
from wan_core.patch import patchify


@dataclass(frozen=True)
class FirstFrame:
    latents: Tensor  # [C, T, H, W], normalised: of a video that is this frame, then grey (0 in [-1, 1])
    embeds: Tensor  # [257, image_dim]: CLIP's hidden states before its last layer

    def channels(self) -> Tensor:
        """A mask and the latents, [4 + C, T, H, W]: what the transformer takes behind the noisy latents' channels.

        The mask's four channels are the four frames of a latent one, 1 where the frame is given; the first latent
        frame stands for one frame, which counts as four (diffusers' `WanImageToVideoPipeline.prepare_latents`).
        """
        mask = torch.zeros_like(self.latents[:1]).repeat(VAE_TEMPORAL_STRIDE, 1, 1, 1)
        mask[:, 0] = 1
        return torch.cat([mask, self.latents])

    def to(self, device: torch.device) -> FirstFrame:
        return FirstFrame(self.latents.to(device), self.embeds.to(device))


def pack_first_frames(frames: Sequence[FirstFrame]) -> tuple[Tensor | None, Tensor | None]:
    """The first frames of a pack's samples, in order; twice None where there are none.

    Returns:
        patches [tokens, 4 * (4 + C)], see `behind`; and the embeddings, one image after another,
        [257 * samples, image_dim].
    """
    if not frames:
        return None, None
    patches = torch.cat([patchify(frame.channels()) for frame in frames])
    return patches, torch.cat([frame.embeds for frame in frames])


def behind(noisy: Tensor, given: Tensor | None) -> Tensor:
    """Patches of noisy latents [tokens, 4 * C] with those of the first frames, if any, behind them.

    A patch's features begin with the channel (see `patchify`), so this is diffusers' concatenation of channels.
    """
    return noisy if given is None else torch.cat([noisy, given], dim=-1)
