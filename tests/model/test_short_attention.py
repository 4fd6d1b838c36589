"""Many short segments in one launch, keys that count more than once among them, against torch piece by piece."""

from __future__ import annotations

import pytest
import torch

from wan_core.model.kernels import _batched_attention, _short_attention, _split, _with_counts
from wan_core.packing import Segments

SEGMENTS = Segments((5, 0, 9, 4), (7, 3, 1, 6), (506, 510, 512, 1))


def tensors(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (sum(SEGMENTS.q_lengths), sum(SEGMENTS.k_lengths), sum(SEGMENTS.k_lengths))
    return [torch.randn(n, 2, 64, generator=generator).to(device, dtype).requires_grad_() for n in lengths]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6)])
def test_counts_as_features_are_a_bias(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = tensors("cpu", dtype)
    expected = _batched_attention(q, k, v, SEGMENTS)
    pieces = zip(*_split(*_with_counts(q, k, v, SEGMENTS), SEGMENTS), strict=True)
    found = [torch.einsum("qhd,khd->hqk", a, b).mul(64**-0.5).softmax(-1) @ c.transpose(0, 1) for a, b, c in pieces]
    found = torch.cat([piece.transpose(0, 1)[..., :64] for piece in found])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_counts_keep_their_digits_in_bfloat16() -> None:
    """log(512) * 8 = 49.9 alone would be off by up to 0.125 in bfloat16, 1.6 % of the weight."""
    q, k, v = tensors("cpu", torch.bfloat16)
    _, with_counts, _ = _with_counts(q, k, v, SEGMENTS)
    bias = with_counts[[6, 9, 10], 0, 64:].double().sum(-1) / 8
    torch.testing.assert_close(bias, torch.tensor([506.0, 510.0, 512.0]).double().log(), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_kernel_equals_torch() -> None:
    inputs = tensors("cuda", torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    found, expected = _short_attention(*inputs, SEGMENTS), _batched_attention(*exact, SEGMENTS)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(expected)
    found.backward(grad.bfloat16())
    expected.backward(grad)
    for one, other in zip(inputs, exact, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=4e-2, atol=4e-2)
