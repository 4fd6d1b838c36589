"""The block's elementwise arithmetic. Statistics, modulation and gated adds are float32, results have x's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.parallel import Parallel, sum_over_tp


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, sample_index: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift with each token's own sample's values.

    Args:
        x: [tokens, h].
        shift, scale: [samples, h] float32.
        sample_index: [tokens] int64.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale[sample_index]) + shift[sample_index]).to(x.dtype)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, sample_index: Tensor) -> Tensor:
    """x + update * gate; x and update [tokens, h], gate [samples, h] float32."""
    return (x.float() + update.float() * gate[sample_index]).to(x.dtype)


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias in float32: the norm before cross-attention."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)


def mean_squares(xs: tuple[Tensor, ...], parallel: Parallel) -> tuple[Tensor, ...]:
    """Mean of squares over the full width of each x [tokens, heads per rank, d], [tokens, 1, 1] float32.

    The heads lie on all tensor-parallel ranks: the sums of all xs share one all-reduce of [tokens] each, where
    gathering q and k themselves would move `h` times as much.
    """
    sums = torch.cat([x.float().square().sum(dim=(1, 2)) for x in xs])
    width = xs[0].shape[1] * xs[0].shape[2] * parallel.tp
    means = sum_over_tp(sums, parallel) / width
    return tuple(mean.view(-1, 1, 1) for mean in means.split([x.shape[0] for x in xs]))


def rms_norm(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [tokens, heads, d] over the root of its mean square, times weight [heads * d]; float32 inside."""
    normed = x.float() * torch.rsqrt(mean_square + eps)
    return (normed * weight.float().view(x.shape[1:])).to(x.dtype)
