"""Attention on a GPU against float64; of parts of the keys too, as ring attention calls FlashAttention 4."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from wan_core.model.kernels import FLASH_FEATURES, block_attention, block_attention_backward, packed_attention
from wan_core.packing import Segments

ERROR = 1e-2  # of bfloat16; the sums of many roundings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (find_spec("flash_attn") and find_spec("flash_attn.cute")), reason="needs flash-attn-4"),
]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dim", [FLASH_FEATURES, 128])
@pytest.mark.parametrize("lengths", [((300,), (411,)), ((130, 1, 257), (64, 500, 3))])
def test_parts_of_the_keys_add_up(lengths: tuple[tuple[int, ...], tuple[int, ...]], dim: int) -> None:
    """Two parts merged by their sums of exponentials, and their gradients added, are attention to all keys."""
    torch.manual_seed(0)
    heads, (q_lengths, k_lengths) = 4, lengths
    q, grad = (torch.randn(sum(q_lengths), heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    parts = [
        [torch.randn(sum(k_lengths), heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(2)
    ]
    segments = Segments(q_lengths, k_lengths)
    outs = [block_attention(q, k, v, segments) for k, v in parts]
    lse = torch.logaddexp(outs[0][1], outs[1][1])
    merged = sum(out.float() * (part - lse).exp()[..., None] for out, part in outs)
    assert isinstance(merged, torch.Tensor)
    grads = [block_attention_backward(grad, q, k, v, merged.bfloat16(), lse, segments) for k, v in parts]

    exact = [q.double().requires_grad_()] + [x.double().requires_grad_() for part in parts for x in part]
    queries, keys = exact[0].split(q_lengths), [x.split(k_lengths) for x in exact[1:]]
    expected = []
    for i, own in enumerate(queries):
        k, v = torch.cat((keys[0][i], keys[2][i])), torch.cat((keys[1][i], keys[3][i]))
        expected.append(exact_attention(own, k, v))
    whole = torch.cat(expected)
    exact_grads = torch.autograd.grad(whole, exact, grad.double())
    found = [grads[0][0].double() + grads[1][0].double(), *(g.double() for part in grads for g in part[1:])]
    for mine, other in zip([merged.double(), *found], [whole, *exact_grads], strict=True):
        assert float((mine - other).norm() / other.norm()) <= ERROR


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("lengths", [(1500,), (1200, 900), (45, 9, 35, 24)], ids=["dense", "packed", "short"])
def test_attention_and_its_gradients_whatever_kernel_is_chosen(lengths: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(sum(lengths), 4, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    grad = torch.randn_like(inputs[0])
    out = packed_attention(*inputs, Segments(lengths, lengths))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.cat([exact_attention(*pieces) for pieces in zip(*(x.split(lengths) for x in exact), strict=True)])
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    for mine, other in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert float((mine.double() - other).norm() / other.norm()) <= ERROR


def test_a_rank_that_holds_nothing_of_a_sample() -> None:
    """As a context-parallel rank does whose part of the pack begins behind it: its text gets no gradient."""
    torch.manual_seed(0)
    segments = Segments((0, 2500, 1300), (512, 512, 300))
    q, k, v = (
        torch.randn(sum(lengths), 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for lengths in (segments.q_lengths, segments.k_lengths, segments.k_lengths)
    )
    out = packed_attention(q, k, v, segments)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    pieces = zip(q.split(segments.q_lengths), k.split(segments.k_lengths), v.split(segments.k_lengths), strict=True)
    expected = torch.cat([exact_attention(*(x.double() for x in piece)) for piece in pieces])
    assert float((out.double() - expected).norm() / expected.norm()) <= ERROR
    assert not grads[1][:512].any() and not grads[2][:512].any()
    assert all(grad.isfinite().all() and grad[-300:].any() for grad in grads)
