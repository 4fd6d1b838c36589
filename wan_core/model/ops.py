"""The block's elementwise arithmetic. Statistics, modulation and gated adds are float32, results have x's dtype.

Each op is a formula in plain torch, and on GPUs one fused kernel forward and one backward (`fused*.py`): plain torch
would write several float32 temporaries of [tokens, h] for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.model.recompute import cheap
from wan_core.model.rope import rotate
from wan_core.parallel import Parallel, heads_to_tokens, sum_over_tp, tokens_to_heads


@cheap
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift with each token's own sample's values.

    Args:
        x: [tokens, h].
        shift, scale: [samples, h] float32.
        lengths: of each sample's run of tokens, in order; 0 is allowed. `Packing.local_lengths`.
    """
    if x.is_cuda:
        from wan_core.model import fused_norm

        return fused_norm.modulated_norm(x, shift, scale, lengths, eps)
    return torch_modulated_norm(x, shift, scale, lengths, eps)


def torch_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + per_token(scale, lengths)) + per_token(shift, lengths)).to(x.dtype)


@cheap
def gated_add(x: Tensor, update: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """x + update * gate; x and update [tokens, h], gate [samples, h] float32, lengths of the samples' runs."""
    if x.is_cuda:
        from wan_core.model import fused

        return fused.gated_add(x, update, gate, lengths)
    return torch_gated_add(x, update, gate, lengths)


def torch_gated_add(x: Tensor, update: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    return (x.float() + update.float() * per_token(gate, lengths)).to(x.dtype)


def per_token(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat each sample's row of [samples, h] for its tokens: [tokens, h]."""
    repeats = torch.tensor(lengths, device=values.device)
    return values.repeat_interleave(repeats, dim=0, output_size=sum(lengths))


@cheap
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [tokens, h]; weight and bias [h] float32."""
    if x.is_cuda:
        from wan_core.model import fused_norm

        return fused_norm.layer_norm(x, weight, bias, eps)
    return torch_layer_norm(x, weight, bias, eps)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias in float32: the norm before cross-attention."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@cheap
def exchange_heads(q: Tensor, k: Tensor, v: Tensor, parallel: Parallel) -> tuple[Tensor, ...]:
    """Ulysses, before attention: [tokens / cp, heads, d] each -> [tokens, heads / cp, d] each.

    Made again, it communicates once more, below 1 % of a step inside a node, and saves as much memory as
    the projection of q, k and v takes.
    """
    return heads_to_tokens(torch.stack((q, k, v), dim=1), parallel).unbind(1)


@cheap
def exchange_tokens(x: Tensor, parallel: Parallel) -> Tensor:
    """Ulysses, after attention: [tokens, heads / cp, d] -> [tokens / cp, heads, d]."""
    return tokens_to_heads(x, parallel)


@cheap
def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


@cheap
def head_norm(
    x: Tensor, weights: Sequence[Tensor], rotary: Tensor | None, eps: float, parallel: Parallel
) -> tuple[Tensor, ...]:
    """RMSNorm over all heads, then rotation, of the first of a projection's interleaved parts.

    The heads lie on all tensor-parallel ranks: they share one all-reduce of a number per token and weight, forward
    and backward, where gathering q and k themselves would move `h` times as much.

    Args:
        x: [tokens, heads per rank, parts, d]; parts are q, k, v of self-attention, q alone, or k, v of text.
        weights: [heads per rank * d] for each part that is normalised: all of them, or all but the last.
        rotary: cos and sin, [2, tokens, d / 2] float32; None leaves the positions out.

    Returns:
        each part, [tokens, heads per rank, d]; the last one as it was, a view of x, where it has no weight.
    """
    if x.is_cuda:
        from wan_core.model import fused_rotary

        return fused_rotary.head_norm(x, weights, rotary, eps, parallel.tp, parallel.tp_group)
    return torch_head_norm(x, weights, rotary, eps, parallel)


def torch_head_norm(
    x: Tensor, weights: Sequence[Tensor], rotary: Tensor | None, eps: float, parallel: Parallel
) -> tuple[Tensor, ...]:
    parts, count = x.unbind(2), len(weights)
    width = x.shape[1] * x.shape[3] * parallel.tp
    squares = torch.stack([part.float().square().sum(dim=(1, 2)) for part in parts[:count]], dim=1)
    means = (sum_over_tp(squares, parallel) / width)[:, :, None, None].unbind(1)
    normed = [rms_norm(*each, eps) for each in zip(parts, means, weights, strict=False)]
    return (*(normed if rotary is None else (rotate(part, rotary) for part in normed)), *parts[count:])


def rms_norm(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [tokens, heads, d] over the root of its mean square, times weight [heads * d]; float32 inside."""
    normed = x.float() * torch.rsqrt(mean_square + eps)
    return (normed * weight.float().view(x.shape[1:])).to(x.dtype)
