# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of kernels)
"""Fused LayerNorm, modulated per sample or with one weight and bias: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from wan_core.model.fused import chunks_of, launch_shape, sum_chunks


@triton.jit
def _norm_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, stats_ptr, table_ptr, eps,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    sample = tl.load(table_ptr + 3 * chunk)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(scale_ptr + sample * WIDTH + columns, mask=inside, other=0.0) + ADD
    shift = tl.load(shift_ptr + sample * WIDTH + columns, mask=inside, other=0.0)
    for row in tl.range(start, stop, num_stages=STAGES):
        x = tl.load(x_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / WIDTH
        centered = tl.where(inside, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
        tl.store(out_ptr + row * WIDTH + columns, centered * rstd * scale + shift, mask=inside)
        tl.store(stats_ptr + 2 * row, mean)
        tl.store(stats_ptr + 2 * row + 1, rstd)


@triton.jit
def _norm_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, stats_ptr, grad_x_ptr, partial_ptr, table_ptr,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    sample = tl.load(table_ptr + 3 * chunk)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(scale_ptr + sample * WIDTH + columns, mask=inside, other=0.0) + ADD
    grad_shift = tl.zeros((BLOCK,), tl.float32)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(start, stop, num_stages=STAGES):
        x = tl.load(x_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
        normed = (x - mean) * rstd  # not 0 outside of the row, but always multiplied by grad, which is
        grad_shift += grad
        grad_scale += grad * normed
        scaled = grad * scale
        along = tl.sum(scaled * normed, axis=0) / WIDTH
        level = tl.sum(scaled, axis=0) / WIDTH
        tl.store(grad_x_ptr + row * WIDTH + columns, (scaled - level - normed * along) * rstd, mask=inside)
    at = partial_ptr + chunk.to(tl.int64) * 2 * WIDTH + columns
    tl.store(at, grad_shift, mask=inside)
    tl.store(at + WIDTH, grad_scale, mask=inside)


class _Norm(Function):
    """LayerNorm(x) * (scale + add) + shift."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, lengths: tuple[int, ...], add: float, eps: float
    ) -> Tensor:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        chunks, (tokens, width) = chunks_of(lengths, x.device), x.shape
        out, stats = torch.empty_like(x), x.new_empty((tokens, 2), dtype=torch.float32)  # mean and 1 / deviation
        shape = launch_shape(width)
        _norm_kernel[(chunks.count,)](
            x, shift, scale, out, stats, chunks.table, eps, ADD=add, WIDTH=width, STAGES=2, **shape
        )  # fmt: skip
        ctx.save_for_backward(x, scale, stats)
        ctx.lengths, ctx.add = lengths, add
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, stats = ctx.saved_tensors
        grad = grads[0].contiguous()
        chunks, width, grad_x = chunks_of(ctx.lengths, x.device), x.shape[1], torch.empty_like(x)
        partial = x.new_empty((chunks.count, 2, width), dtype=torch.float32)
        shape = launch_shape(width)
        _norm_backward_kernel[(chunks.count,)](
            grad, x, scale, stats, grad_x, partial, chunks.table, ADD=ctx.add, WIDTH=width, STAGES=2, **shape
        )  # fmt: skip
        grad_shift, grad_scale = sum_chunks(partial, chunks).unbind(1)
        return grad_x, grad_shift, grad_scale, None, None, None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    """See `ops.modulated_norm`. Saves x and two float32 per token for the backward pass."""
    return _Norm.apply(x, shift, scale, tuple(lengths), 1.0, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `ops.layer_norm`: the modulated norm of one sample whose scale is weight - 1."""
    return _Norm.apply(x, bias[None], weight[None], (x.shape[0],), 0.0, eps)
