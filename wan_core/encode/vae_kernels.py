# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of kernels)
"""Two kernels for the VAE's encoder on GPUs: sum, norm, SiLU and padding in one pass, and the 3x3x3 convolution."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wan_core.encode.vae_encoder import MAX_OFFSET

PADDED_ELEMENTS = 8192  # per program
SHARED_256 = 128 << 10  # bytes that a tile of 256 rows needs; cards of 8.6, 8.9 and 12.0 have 99 KiB, one of 128 80


@triton.jit
def _padded_kernel(
    x_ptr, bias_ptr, residual_ptr, gamma_ptr, padded_ptr, sum_ptr,
    x_b, x_t, x_h, x_w, r_b, r_t, r_h, r_w, length, height, width, rows, low,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP_SUM: tl.constexpr, SPLIT: tl.constexpr,
    PAST: tl.constexpr, BEFORE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines, pixels = height + BEFORE + 1, width + BEFORE + 1
    w = row % pixels - BEFORE
    h = row // pixels % lines - BEFORE
    t = row // (pixels * lines) % length
    b = row // (pixels * lines * length)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (w >= 0) & (w < width) & (h >= 0) & (h < height)
    mask = inside[:, None] & (columns < CHANNELS)
    x = tl.load(x_ptr + (b * x_b + t * x_t + h * x_h + w * x_w)[:, None] + columns, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < CHANNELS, other=0.0)
    if HAS_RESIDUAL:
        at = (b * r_b + t * r_t + h * r_h + w * r_w)[:, None] + columns
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KEEP_SUM:
        at = (((b * length + t) * height + h) * width + w)[:, None] * CHANNELS + columns
        tl.store(sum_ptr + at, x, mask=mask)
    y = tl.where(mask, x, 0.0)
    if NORM:
        size = tl.sqrt(tl.sum(y * y, axis=1))
        y = y / tl.maximum(size, 1e-12)[:, None] * tl.load(gamma_ptr + columns, mask=columns < CHANNELS, other=0.0)
        y = y / (1 + tl.exp(-y))
    at = ((b * (length + PAST) + t + PAST) * lines + h + BEFORE) * pixels + w + BEFORE
    at = at[:, None] * CHANNELS + columns
    mask = (row < rows)[:, None] & (columns < CHANNELS)  # the border gets its zeros
    high = y.to(padded_ptr.dtype.element_ty)
    tl.store(padded_ptr + at, high, mask=mask)
    if SPLIT:
        tl.store(padded_ptr + low.to(tl.int64) + at, y - high.to(tl.float32), mask=mask)


def write_padded(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None, padded: Tensor, total: Tensor | None
) -> None:
    """s = x + bias + residual into the middle of `padded`, as silu(gamma * s / |s|) if gamma is given.

    Args:
        x, residual: [B, T, H, W, C], any strides but the last, which is 1.
        bias, gamma: float32 [C].
        padded: [terms, B, 2 + T, H + 2, W + 2, C] (its first two frames stay as they are, the rest of the border is
            set to zero) or [terms, B, T, H + 1, W + 1, C] (zeros at the right and below). With two terms, the second
            gets what the first one's rounding took.
        total: [B, T, H, W, C] that gets s, or None.
    """
    batch, length, height, width, channels = x.shape
    terms, _, frames, lines, pixels, _ = padded.shape
    assert x.stride(-1) == 1 and padded.is_contiguous() and (residual is None or residual.stride(-1) == 1)
    assert padded.numel() < MAX_OFFSET, f"padded {tuple(padded.shape)} has too many elements for 32-bit offsets"
    rows = batch * length * lines * pixels
    block = triton.next_power_of_2(channels)
    per_program = max(PADDED_ELEMENTS // block, 1)
    _padded_kernel[(triton.cdiv(rows, per_program),)](
        x, bias, residual, gamma, padded, total, *x.stride()[:4], *(x if residual is None else residual).stride()[:4],
        length, height, width, rows, padded.stride(0), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        NORM=gamma is not None, KEEP_SUM=total is not None, SPLIT=terms == 2, PAST=frames - length,
        BEFORE=lines - height - 1, CHANNELS=channels, BLOCK=block, ROWS=per_program, num_warps=8,
    )  # fmt: skip


@triton.jit
def _conv3_kernel(
    x_desc, w_desc, w2_desc, out_ptr, rows_in, rows_out, line, frame, rows_low,
    STEPS: tl.constexpr, PASSES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Rows are pixels of the padded clip: so many lines or frames later is so many rows further on."""
    row, column = tl.program_id(2) * rows_in + tl.program_id(1) * M, tl.program_id(0) * (N + N // 2)
    first = tl.zeros((M, N), tl.float32)
    second = tl.zeros((M, N // 2), tl.float32)
    for step in range(PASSES * 9 * STEPS):
        term, tap = step // (9 * STEPS), step // STEPS % 9
        shift = tap // 3 * frame + tap % 3 * line + term // 2 * rows_low
        at = step % (9 * STEPS) * K + term % 2 * (9 * STEPS * K)
        x = x_desc.load([row + shift, step % STEPS * K])
        first = tl.dot(x, w_desc.load([column, at]).T, first)
        second = tl.dot(x, w2_desc.load([column + N, at]).T, second)
    out_rows = tl.program_id(2) * rows_out + tl.program_id(1) * M + tl.arange(0, M)
    at = out_rows[:, None] * OUTPUTS + column  # plain stores: through a descriptor they would need more shared memory
    tl.store(out_ptr + at + tl.arange(0, N)[None, :], first)
    tl.store(out_ptr + at + N + tl.arange(0, N // 2)[None, :], second)


def conv_table(weight: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """A weight [out, C, 3, 3, 3] as `conv3` reads it: [out, (term, dt, dh, (dw, C))], (dw, C) in whole steps."""
    outputs, channels = weight.shape[:2]
    lines = weight.permute(0, 2, 3, 4, 1).reshape(outputs, 9, 3 * channels)
    lines = torch.nn.functional.pad(lines, (0, -3 * channels % step_of(channels))).flatten(1)
    high = lines.to(dtype)
    return torch.cat([high, (lines - high.float()).to(dtype)], 1) if terms == 2 else high


def step_of(channels: int) -> int:
    """Products per step."""
    return 32 if channels < 32 else 64


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of one block at most; the interpreter has what it needs."""
    if device.type == "cpu":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def conv3(padded: Tensor, table: Tensor, out_dtype: torch.dtype, m: int = 0, warps: int = 8, stages: int = 3) -> Tensor:
    """A 3x3x3 convolution as nine matrix products of shifted rows, a row being three neighbouring pixels.

    Args:
        padded: 16-bit [terms, B, 2 + T, H + 2, W + 2, C], contiguous. With two terms the products are
            high * high + high * low + low * high: as good as float32's, but for the sums.
        table: [out, ...] of `conv_table` with as many terms; out a multiple of 96: a tile is 64 + 32 or 128 + 64 wide.
        m, warps, stages: rows of a tile, and Triton's settings.

    Returns:
        [B, T, H, W, out], a view of rows that has the border's pixels between them.
    """
    terms, batch, frames, lines, pixels, channels = padded.shape
    outputs, rows_in, rows_out = table.shape[0], frames * lines * pixels, (frames - 2) * lines * pixels
    k, n = step_of(channels), 128 if table.shape[0] % 192 == 0 else 64
    m = m or (256 if n == 128 and shared_memory(padded.device) >= SHARED_256 else 128)
    # The last two rows would reach past the end; they are border.
    rows = TensorDescriptor(padded, [terms * batch * rows_in - 2, 3 * channels], [channels, 1], [m, k])
    tiles = triton.cdiv(rows_out, m)
    out = padded.new_empty((batch * tiles * m, outputs), dtype=out_dtype)  # whole tiles: none touches the next clip
    _conv3_kernel[(outputs // (n + n // 2), tiles, batch)](
        rows, TensorDescriptor.from_tensor(table, [n, k]), TensorDescriptor.from_tensor(table, [n // 2, k]),
        out, rows_in, tiles * m, pixels, lines * pixels, batch * rows_in, STEPS=triton.cdiv(3 * channels, k),
        PASSES=3 if terms == 2 else 1, M=m, N=n, K=k, OUTPUTS=outputs, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = out.view(batch, tiles * m, outputs)[:, :rows_out].unflatten(1, (frames - 2, lines, pixels))
    return out[:, :, : lines - 2, : pixels - 2]
