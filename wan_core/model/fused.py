# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of kernels)
"""Fused GPU kernels (Triton): the work's division over programs, per-sample sums, the gated add.

Every kernel here and in `fused_norm` and `fused_rotary` is bound by memory traffic: it reads each activation once,
computes in float32 and writes once. A program works on a chunk of consecutive tokens of one sample, so that the
sample's shift, scale and gate, and the sums that become their gradients, stay in registers. The sums are written per
chunk and added up in a fixed order by a second kernel: atomics would make the gradients differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MAX_CHUNKS = 1056  # 8 for each of an H200's 132 multiprocessors


@dataclass(frozen=True)
class Chunks:
    """Runs of consecutive tokens, each inside one sample."""

    table: Tensor  # (sample, first token, end), [chunks, 3] int64
    offsets: Tensor  # each sample's first chunk, then their number, [samples + 1] int64

    @property
    def count(self) -> int:
        return self.table.shape[0]


@lru_cache(maxsize=64)
def chunks_of(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    """About MAX_CHUNKS equal chunks of the samples' tokens."""
    size = max(1, -(-sum(lengths) // MAX_CHUNKS))
    rows, offsets, start = [], [0], 0
    for sample, length in enumerate(lengths):
        stop = start + length
        rows += [(sample, first, min(first + size, stop)) for first in range(start, stop, size)]
        offsets.append(len(rows))
        start = stop
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    return Chunks(table.to(device), torch.tensor(offsets).to(device))


def launch_shape(width: int) -> dict[str, int]:
    """Block and warps of a program that holds one token's `width` values."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 256))}


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, offsets_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(1)
    first, end = tl.load(offsets_ptr + sample), tl.load(offsets_ptr + sample + 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(first, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + sample * WIDTH + columns, tl.sum(total, axis=0), mask=columns < WIDTH)


def sum_chunks(partial: Tensor, chunks: Chunks) -> Tensor:
    """Add each sample's chunks in a fixed order: [chunks, ...] -> [samples, ...] float32."""
    samples, width = chunks.offsets.shape[0] - 1, partial[0].numel()
    out = torch.empty((samples, *partial.shape[1:]), dtype=torch.float32, device=partial.device)
    _sum_kernel[(triton.cdiv(width, 32), samples)](partial, out, chunks.offsets, width, ROWS=128, COLUMNS=32)
    return out


@triton.jit
def _gate_kernel(
    x_ptr, update_ptr, gate_ptr, out_ptr, table_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(1)
    sample = tl.load(table_ptr + 3 * chunk)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_ptr + sample * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    for row in tl.range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < stop)[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, x + update * gate[None, :], mask=mask)


@triton.jit
def _gate_backward_kernel(
    grad_ptr, update_ptr, gate_ptr, grad_update_ptr, partial_ptr, table_ptr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    sample = tl.load(table_ptr + 3 * chunk)
    start, stop = tl.load(table_ptr + 3 * chunk + 1), tl.load(table_ptr + 3 * chunk + 2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_ptr + sample * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < stop)[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_update_ptr + at, grad * gate[None, :], mask=mask)
        total += grad * update
    tl.store(partial_ptr + chunk.to(tl.int64) * WIDTH + columns, tl.sum(total, axis=0), mask=columns < WIDTH)


GATE_TILE = {"ROWS": 8, "COLUMNS": 256}


class _GatedAdd(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor, lengths: tuple[int, ...]) -> Tensor:
        x, update, gate = x.contiguous(), update.contiguous(), gate.contiguous()
        ctx.save_for_backward(update, gate)
        ctx.lengths = lengths
        chunks, width, out = chunks_of(lengths, x.device), x.shape[1], torch.empty_like(x)
        grid = (triton.cdiv(width, GATE_TILE["COLUMNS"]), chunks.count)
        _gate_kernel[grid](x, update, gate, out, chunks.table, width, **GATE_TILE)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        grad = grads[0].contiguous()
        chunks, width = chunks_of(ctx.lengths, grad.device), grad.shape[1]
        grad_update, partial = torch.empty_like(update), grad.new_empty((chunks.count, width), dtype=torch.float32)
        grid = (triton.cdiv(width, GATE_TILE["COLUMNS"]), chunks.count)
        _gate_backward_kernel[grid](grad, update, gate, grad_update, partial, chunks.table, width, **GATE_TILE)
        return grads[0], grad_update, sum_chunks(partial, chunks), None


def gated_add(x: Tensor, update: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """See `ops.gated_add`. Saves `update` for the backward pass."""
    return _GatedAdd.apply(x, update, gate, tuple(lengths))
