"""Latents to patches and back. A patch is 1 frame x 2 x 2 latents; one patch is one token of the transformer."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from wan_core.config import PATCH_SIZE, check


@dataclass(frozen=True)
class GridSize:
    """A video's size in patches."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @classmethod
    def of(cls, latents: Tensor) -> GridSize:
        """Grid of latents [C, T, H, W].

        Raises:
            ValueError: T, H or W is not a multiple of the patch size (1, 2, 2).
        """
        sizes = tuple(latents.shape[-3:])
        check(
            all(size > 0 and size % patch == 0 for size, patch in zip(sizes, PATCH_SIZE, strict=True)),
            f"latents of frames, height, width {sizes} do not divide into patches of {PATCH_SIZE}; "
            "encode videos whose height and width are multiples of 16",
        )
        return cls(*(size // patch for size, patch in zip(sizes, PATCH_SIZE, strict=True)))


def patchify(latents: Tensor) -> Tensor:
    """[..., C, T, H, W] -> [..., tokens, C * 4], features (c, pt, ph, pw) as the patch embedding's Conv3d has them."""
    pt, ph, pw = PATCH_SIZE
    return rearrange(latents, "... c (f pt) (h ph) (w pw) -> ... (f h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def patchify_output(latents: Tensor) -> Tensor:
    """[..., C, T, H, W] -> [..., tokens, 4 * C], features (pt, ph, pw, c) as the model's head writes them."""
    pt, ph, pw = PATCH_SIZE
    return rearrange(latents, "... c (f pt) (h ph) (w pw) -> ... (f h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(output: Tensor, grid: GridSize) -> Tensor:
    """The inverse of `patchify_output`: [tokens, 4 * C] -> [C, T, H, W]."""
    pt, ph, pw = PATCH_SIZE
    return rearrange(
        output, "(f h w) (pt ph pw c) -> c (f pt) (h ph) (w pw)",
        f=grid.frames, h=grid.height, w=grid.width, pt=pt, ph=ph, pw=pw,
    )  # fmt: skip
