# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of kernels)
"""Two kernels for the VAE's encoder on GPUs: sum, norm, SiLU and padding in one pass, and the 3x3x3 convolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

PADDED_ELEMENTS = 8192  # per program


@triton.jit
def _to_tf32(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _padded_kernel(
    x_ptr, bias_ptr, residual_ptr, gamma_ptr, padded_ptr, sum_ptr,
    x_b, x_t, x_h, x_w, r_b, r_t, r_h, r_w, length, height, width, rows,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP_SUM: tl.constexpr, TF32: tl.constexpr,
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
    if TF32:
        y = _to_tf32(y)
    at = ((b * (length + PAST) + t + PAST) * lines + h + BEFORE) * pixels + w + BEFORE
    at = at[:, None] * CHANNELS + columns
    tl.store(padded_ptr + at, y, mask=(row < rows)[:, None] & (columns < CHANNELS))  # the border gets its zeros


def write_padded(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None, padded: Tensor, total: Tensor | None,
    tf32: bool,
) -> None:  # fmt: skip
    """s = x + bias + residual into the middle of `padded`, as silu(gamma * s / |s|) if gamma is given.

    Args:
        x, residual: [B, T, H, W, C], any strides but the last, which is 1.
        bias, gamma: float32 [C].
        padded: [B, 2 + T, H + 2, W + 2, C] (its first two frames stay as they are, the rest of the border is set to
            zero) or [B, T, H + 1, W + 1, C] (zeros at the right and below).
        total: [B, T, H, W, C] that gets s, or None.
        tf32: round what goes into `padded` to TF32.
    """
    batch, length, height, width, channels = x.shape
    before, past = padded.shape[2] - height - 1, padded.shape[1] - length
    assert x.stride(-1) == 1 and padded.is_contiguous() and (residual is None or residual.stride(-1) == 1)
    assert padded.numel() < 2**31, f"padded {tuple(padded.shape)} has too many elements for 32-bit offsets"
    rows = batch * length * padded.shape[2] * padded.shape[3]
    block = triton.next_power_of_2(channels)
    per_program = max(PADDED_ELEMENTS // block, 1)
    _padded_kernel[(triton.cdiv(rows, per_program),)](
        x, bias, residual, gamma, padded, total, *x.stride()[:4], *(x if residual is None else residual).stride()[:4],
        length, height, width, rows, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        NORM=gamma is not None, KEEP_SUM=total is not None, TF32=tf32, PAST=past, BEFORE=before, CHANNELS=channels,
        BLOCK=block, ROWS=per_program, num_warps=8,
    )  # fmt: skip


@triton.jit
def _conv3_kernel(
    x_desc, w_desc, w2_desc, out_desc, out2_desc, rows_in, rows_out, line, frame,
    STEPS: tl.constexpr, MERGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Rows are pixels of the padded clip: so many lines or frames later is so many rows further on."""
    row, column = tl.program_id(2) * rows_in + tl.program_id(1) * M, tl.program_id(0) * (N + N // 2)
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    taps: tl.constexpr = 9 if MERGED else 27
    first = tl.zeros((M, N), tl.float32)
    second = tl.zeros((M, N // 2), tl.float32)
    for step in range(taps * STEPS):
        tap = step // STEPS
        shift = tap // 3 * frame + tap % 3 * line if MERGED else tap // 9 * frame + tap // 3 % 3 * line + tap % 3
        x = x_desc.load([row + shift, step % STEPS * K])
        first = tl.dot(x, w_desc.load([column, step * K]).T, first, input_precision=precision)
        second = tl.dot(x, w2_desc.load([column + N, step * K]).T, second, input_precision=precision)
    out_row = tl.program_id(2) * rows_out + tl.program_id(1) * M
    out_desc.store([out_row, column], first.to(out_desc.dtype))
    out2_desc.store([out_row, column + N], second.to(out_desc.dtype))


def conv3(
    padded: Tensor, weight: Tensor, tf32: bool, m: int = 128, k: int = 64, warps: int = 8, stages: int = 3,
    merged: bool = True,
) -> Tensor:  # fmt: skip
    """A 3x3x3 convolution as matrix products of shifted rows.

    Args:
        padded: [B, 2 + T, H + 2, W + 2, C], contiguous.
        weight: [out, C, 3, 3, 3], out a multiple of 96: a tile is 64 + 32 or 128 + 64 channels wide.
        m, k, warps, stages: rows of a tile, products per step (at most), and Triton's settings.
        merged: a row is three neighbouring pixels, so that there are nine shifts; else one pixel, and 27.

    Returns:
        [B, T, H, W, out], a view of rows that has the border's pixels between them.
    """
    batch, frames, lines, pixels, channels = padded.shape
    outputs, rows_in, rows_out = weight.shape[0], frames * lines * pixels, (frames - 2) * lines * pixels
    k = min(k, 128 // padded.element_size())
    n = 128 if outputs % 192 == 0 else 64
    joined = 3 if merged else 1
    steps = triton.cdiv(joined * channels, k)
    table = weight.permute(0, 2, 3, 4, 1).reshape(outputs, 27 // joined, joined * channels)
    table = torch.nn.functional.pad(table, (0, steps * k - joined * channels)).flatten(1)
    # The last two rows would reach past the end; they are border.
    rows = TensorDescriptor(padded, [batch * rows_in - joined + 1, joined * channels], [channels, 1], [m, k])
    tiles = triton.cdiv(rows_out, m)
    out = padded.new_empty(batch * tiles * m, outputs)  # whole tiles: the last of a clip must not touch the next clip
    _conv3_kernel[(outputs // (n + n // 2), tiles, batch)](
        rows, TensorDescriptor.from_tensor(table, [n, k]), TensorDescriptor.from_tensor(table, [n // 2, k]),
        TensorDescriptor.from_tensor(out, [m, n]), TensorDescriptor.from_tensor(out, [m, n // 2]),
        rows_in, tiles * m, pixels, lines * pixels, STEPS=steps, MERGED=merged, M=m, N=n, K=k, TF32=tf32,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = out.view(batch, tiles * m, outputs)[:, :rows_out].unflatten(1, (frames - 2, lines, pixels))
    return out[:, :, : lines - 2, : pixels - 2]
