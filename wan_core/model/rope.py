"""3D rotary position embedding: the head dimension is split between frame, row and column positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from wan_core.architecture import ROPE_POSITIONS
from wan_core.config import check
from wan_core.packing import Packing
from wan_core.patch import GridSize

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions for frames, rows and columns: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@cache
def _axis_angles(dim: int) -> Tensor:
    """Angles of every position, [1024, dim / 2] float64."""
    frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(ROPE_POSITIONS, dtype=torch.float64), frequencies)


@cache
def _grid_rotary(grid: GridSize, head_dim: int) -> Tensor:
    """cos and sin of one grid's angles, [2, tokens, head_dim / 2] float32; computed in float64."""
    sizes = (grid.frames, grid.height, grid.width)
    check(max(sizes) <= ROPE_POSITIONS, f"grid {sizes} exceeds {ROPE_POSITIONS} positions per axis; use smaller videos")
    parts = []
    for axis, (size, dim) in enumerate(zip(sizes, axis_dims(head_dim), strict=True)):
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        parts.append(_axis_angles(dim)[:size].view(shape).expand(*sizes, dim // 2))
    angles = torch.cat(parts, dim=-1).reshape(grid.num_tokens, head_dim // 2)
    return torch.stack((angles.cos(), angles.sin())).float()


def packed_rotary(packing: Packing, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin for this rank's tokens, [2, local tokens, head_dim / 2] float32; padding is not rotated."""
    tables: Sequence[Tensor] = [_grid_rotary(grid, head_dim) for grid in packing.grids]
    padding = packing.num_tokens - packing.num_real_tokens
    if padding:
        tables = [*tables, torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, padding, head_dim // 2)]
    return torch.cat(list(tables), dim=1)[:, packing.start : packing.stop].to(device, non_blocking=True)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [tokens, heads, head_dim] in float32; returns x's dtype."""
    cos, sin = rotary.unsqueeze(2)  # [tokens, 1, head_dim / 2] each
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
