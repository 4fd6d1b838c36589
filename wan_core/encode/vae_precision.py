"""How exactly the VAE is computed: in which data types, and what a float32 value is in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """How the encoder computes. The residual stream is float32 always, and so are sums."""

    product: torch.dtype  # of the operands of 3x3x3 convolutions, which are nine tenths of the work
    partial: torch.dtype  # what these convolutions' results are stored in until they are added to the stream
    other: torch.dtype  # of the operands of all else
    two_terms: Literal["none", "widest", "all"] = "none"  # which 3x3x3 convolutions take halves of float32 values
    tf32: bool = False  # whether float32 products of all else may be TF32's


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The widest convolutions and the first one are a quarter of the work and make more than half of the error.
PRECISIONS = {
    "float32": Precision(F32, F32, F32),
    "float16x3": Precision(F16, F32, F32, two_terms="all"),
    "float16": Precision(F16, F32, F32, two_terms="widest", tf32=True),
    "bfloat16": Precision(BF16, BF16, BF16),
}


def to_float(video: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; floats are there already."""
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video.float()


def halved(x: Tensor, dtype: torch.dtype, terms: int) -> list[Tensor]:
    """A float32 tensor's rounding and, as a second term, the rounding of what is left."""
    high = x.to(dtype)
    return [high] if terms == 1 else [high, (x - high.float()).to(dtype)]


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """TF32 in cuDNN and cuBLAS on or off, and back; torch's own default is on for convolutions."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
