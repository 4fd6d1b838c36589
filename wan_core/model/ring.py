"""Ring attention: queries stay on their context-parallel rank, keys and values travel from rank to rank.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv:2310.01889). Each rank holds a
contiguous part of the pack, cut through samples anywhere: a block is what the samples of one rank's queries have in
common with another rank's keys, so packs of any lengths work without padding them. Unlike an exchange of heads, the
ring is not limited by their number; its work is even over the ranks only where samples are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from wan_core.model.kernels import block_attention, block_attention_backward
from wan_core.packing import Packing, Segments
from wan_core.parallel import Parallel, pass_on


@dataclass(frozen=True)
class _Block:
    """The queries and keys of two ranks that belong to the same samples: a slice of each, and their boundaries."""

    q: slice
    k: slice
    segments: Segments


def _block(packing: Packing, source: int) -> _Block | None:
    """This rank's queries against rank `source`'s keys; None where they have no sample in common."""
    size = packing.num_local_tokens
    mine = _inside(packing, packing.start)
    theirs = _inside(packing, source * size)
    common = [i for i, (q, k) in enumerate(zip(mine, theirs, strict=True)) if q and k]
    if not common:
        return None
    first, last = common[0], common[-1] + 1
    q_lengths, k_lengths = mine[first:last], theirs[first:last]
    q_start, k_start = sum(mine[:first]), sum(theirs[:first])
    return _Block(
        slice(q_start, q_start + sum(q_lengths)), slice(k_start, k_start + sum(k_lengths)),
        Segments(q_lengths, k_lengths),
    )  # fmt: skip


def _inside(packing: Packing, start: int) -> tuple[int, ...]:
    """How many tokens of each segment lie in the rank's part that begins at `start`."""
    stop, position, counts = start + packing.num_local_tokens, 0, []
    for length in packing.self_segments.q_lengths:
        counts.append(max(0, min(position + length, stop) - max(position, start)))
        position += length
    return tuple(counts)


class _RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, parallel: Parallel) -> Tensor:
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)  # [tokens, heads]
        kv = torch.stack((k, v))
        for step in range(parallel.cp):
            arriving = pass_on(kv, parallel) if step < parallel.cp - 1 else None
            block = _block(packing, (parallel.cp_rank - step) % parallel.cp)
            if block is not None:
                part, part_lse = block_attention(q[block.q], kv[0, block.k], kv[1, block.k], block.segments)
                before, after = lse[block.q], torch.logaddexp(lse[block.q], part_lse)
                out[block.q] *= (before - after).exp()[..., None]
                out[block.q] += part.float() * (part_lse - after).exp()[..., None]
                lse[block.q] = after
            if arriving is not None:
                kv = arriving()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packing, ctx.parallel = packing, parallel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """A block's gradients need the whole row's lse and output only, so the ring is run again. The sum of a block's
        key and value gradients travels one step behind them, and comes home after the last."""
        q, k, v, out, lse = ctx.saved_tensors
        packing, parallel, grad = ctx.packing, ctx.parallel, grads[0].contiguous()
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        kv = torch.stack((k, v))
        sums = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
        for step in range(parallel.cp):
            arriving = pass_on(kv, parallel) if step < parallel.cp - 1 else None
            sums_arriving = pass_on(sums, parallel, tag=1) if step > 0 else None
            block = _block(packing, (parallel.cp_rank - step) % parallel.cp)
            if block is not None:
                part_q, part_k, part_v = block_attention_backward(
                    grad[block.q],
                    q[block.q],
                    kv[0, block.k],
                    kv[1, block.k],
                    out[block.q],
                    lse[block.q],
                    block.segments,
                )
                grad_q[block.q] += part_q
            if sums_arriving is not None:
                sums = sums_arriving()
            if block is not None:
                sums[0, block.k] += part_k
                sums[1, block.k] += part_v
            if arriving is not None:
                kv = arriving()
        sums = pass_on(sums, parallel, tag=1)()
        return grad_q.to(q.dtype), *sums.to(q.dtype), None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, parallel: Parallel) -> Tensor:
    """Attention of each sample's tokens to one another, over all context-parallel ranks.

    Args:
        q, k, v: this rank's tokens, [local tokens, heads, d].

    Returns:
        [local tokens, heads, d].
    """
    return _RingAttention.apply(q, k, v, packing, parallel)
