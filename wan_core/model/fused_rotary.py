# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of kernels)
"""Fused RMSNorm over all heads of q and k, with rotary embedding, straight from and into the projection's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from wan_core.model.fused import chunks_of, launch_shape, sum_chunks

# A token's sums over the full width need the other tensor-parallel ranks between the two halves of a kernel's work.
WHOLE = tl.constexpr(0)
SUMS = tl.constexpr(1)
APPLY = tl.constexpr(2)


@triton.jit
def _pick(part, a, b, c):
    chosen = a
    if part == 1:
        chosen = b
    if part == 2:
        chosen = c
    return tl.multiple_of(chosen, 16)  # bytes: without the hint the loads would not be vectors


@triton.jit
def _rotate(x, cos, sin, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _heads_kernel(
    x_ptr, out0_ptr, out1_ptr, weight_ptr, cos_ptr, sin_ptr, sums_ptr, table_ptr, eps, full_width,
    STEP: tl.constexpr, ROTATE: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, chunk = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    angles = tl.arange(0, BLOCK // 2) % (DIM // 2)
    inside = columns < WIDTH
    source = x_ptr + (columns // DIM) * (PARTS * DIM) + part * DIM + columns % DIM
    out_ptr = _pick(part, out0_ptr, out1_ptr, out0_ptr)
    weight = tl.load(weight_ptr + part * WIDTH + columns, mask=inside, other=0.0)
    for row in tl.range(start, stop, num_stages=STAGES):
        x = tl.load(source + row * (PARTS * WIDTH), mask=inside, other=0.0).to(tl.float32)
        if STEP == APPLY:
            total = tl.load(sums_ptr + row * NORMED + part)
        else:
            total = tl.sum(x * x, axis=0)
            tl.store(sums_ptr + row * NORMED + part, total)
        if STEP != SUMS:
            y = x * (1 / tl.sqrt(total / full_width + eps)) * weight
            if ROTATE:
                cos = tl.load(cos_ptr + row * (DIM // 2) + angles)
                sin = tl.load(sin_ptr + row * (DIM // 2) + angles)
                y = _rotate(y, cos, sin, BLOCK)
            tl.store(out_ptr + row * WIDTH + columns, y, mask=inside)


@triton.jit
def _heads_backward_kernel(
    grad0_ptr, grad1_ptr, grad2_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, sums_ptr, dots_ptr, grad_x_ptr, partial_ptr,
    table_ptr, eps, full_width,
    STEP: tl.constexpr, ROTATE: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, chunk = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    place = (columns // DIM) * (PARTS * DIM) + part * DIM + columns % DIM
    grad_ptr = _pick(part, grad0_ptr, grad1_ptr, grad2_ptr)
    if part >= NORMED:  # the values, which the forward pass only passes through
        for row in tl.range(start, stop, num_stages=STAGES):
            grad = tl.load(grad_ptr + row * WIDTH + columns, mask=inside, other=0.0)
            tl.store(grad_x_ptr + place + row * (PARTS * WIDTH), grad, mask=inside)
    else:
        angles = tl.arange(0, BLOCK // 2) % (DIM // 2)
        weight = tl.load(weight_ptr + part * WIDTH + columns, mask=inside, other=0.0)
        grad_weight = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(start, stop, num_stages=STAGES):
            grad = tl.load(grad_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + place + row * (PARTS * WIDTH), mask=inside, other=0.0).to(tl.float32)
            if ROTATE:
                cos = tl.load(cos_ptr + row * (DIM // 2) + angles)
                sin = tl.load(sin_ptr + row * (DIM // 2) + angles)
                grad = _rotate(grad, cos, -sin, BLOCK)
            dot = tl.load(dots_ptr + row * NORMED + part) if STEP == APPLY else tl.sum(grad * weight * x, axis=0)
            if STEP == SUMS:
                tl.store(dots_ptr + row * NORMED + part, dot)
            else:
                inverse = 1 / tl.sqrt(tl.load(sums_ptr + row * NORMED + part) / full_width + eps)
                normed = x * inverse
                grad_weight += grad * normed
                grad_x = (grad * weight - normed * (inverse * dot / full_width)) * inverse
                tl.store(grad_x_ptr + place + row * (PARTS * WIDTH), grad_x, mask=inside)
        if STEP != SUMS:
            at = partial_ptr + (chunk.to(tl.int64) * NORMED + part) * WIDTH + columns
            tl.store(at, grad_weight, mask=inside)


def _aligned(x: Tensor) -> Tensor:
    """A view may begin anywhere; `_pick` promises the compiler multiples of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


class _HeadNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotary: Tensor | None, eps: float, tp: int, group: Any
    ) -> tuple[Tensor, ...]:
        x, weight = x.contiguous(), weight.float().contiguous()
        tokens, heads, parts, dim = x.shape
        normed, width = weight.shape
        assert width == heads * dim and parts - 1 <= normed <= min(parts, 2), (x.shape, weight.shape)
        chunks = chunks_of((tokens,), x.device)
        outputs = [x.new_empty(tokens, heads, dim) for _ in range(normed)]
        sums = x.new_empty((tokens, normed), dtype=torch.float32)
        cos, sin = (sums, sums) if rotary is None else rotary.contiguous().unbind(0)
        arguments = (x, outputs[0], outputs[-1], weight, cos, sin, sums, chunks.table, eps, float(width * tp))
        sizes = {"PARTS": parts, "NORMED": normed, "DIM": dim, "WIDTH": width, "STAGES": 2, **launch_shape(width)}
        grid, rotate = (normed, chunks.count), rotary is not None
        if tp == 1:
            _heads_kernel[grid](*arguments, STEP=WHOLE, ROTATE=rotate, **sizes)
        else:
            _heads_kernel[grid](*arguments, STEP=SUMS, ROTATE=rotate, **sizes)
            dist.all_reduce(sums, group=group)
            _heads_kernel[grid](*arguments, STEP=APPLY, ROTATE=rotate, **sizes)
        ctx.save_for_backward(x, weight, sums, rotary)
        ctx.eps, ctx.tp, ctx.group = eps, tp, group
        return (*outputs, *x[:, :, normed:].unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sums, rotary = ctx.saved_tensors
        _, _, parts, dim = x.shape
        normed, width = weight.shape
        chunks = chunks_of((x.shape[0],), x.device)
        grads = tuple(_aligned(grad.contiguous()) for grad in grads)
        grad_x, dots = torch.empty_like(x), torch.empty_like(sums)
        partial = torch.empty((chunks.count, normed, width), dtype=torch.float32, device=x.device)
        cos, sin = (sums, sums) if rotary is None else rotary.contiguous().unbind(0)
        arguments = (
            grads[0], grads[min(1, parts - 1)], grads[-1], x, weight, cos, sin, sums, dots, grad_x, partial,
            chunks.table, ctx.eps, float(width * ctx.tp),
        )  # fmt: skip
        sizes = {"PARTS": parts, "NORMED": normed, "DIM": dim, "WIDTH": width, "STAGES": 2, **launch_shape(width)}
        rotate = rotary is not None
        if ctx.tp == 1:
            _heads_backward_kernel[(parts, chunks.count)](*arguments, STEP=WHOLE, ROTATE=rotate, **sizes)
        else:
            _heads_backward_kernel[(normed, chunks.count)](*arguments, STEP=SUMS, ROTATE=rotate, **sizes)
            dist.all_reduce(dots, group=ctx.group)
            _heads_backward_kernel[(parts, chunks.count)](*arguments, STEP=APPLY, ROTATE=rotate, **sizes)
        return grad_x, sum_chunks(partial, chunks)[0], None, None, None, None


def head_norm(
    x: Tensor, weights: Sequence[Tensor], rotary: Tensor | None, eps: float, tp: int = 1, group: Any = None
) -> tuple[Tensor, ...]:
    """See `ops.head_norm`. Saves x and a float32 per token and weight for the backward pass."""
    return _HeadNorm.apply(x, torch.stack(tuple(weights)).float(), rotary, eps, tp, group)
