"""Variable-length attention: FlashAttention 4 or cuDNN on GPUs, torch's SDPA per segment elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.packing import Segments

Backend = Literal["flash_attention_4", "cudnn", "sdpa"]
# FlashAttention 4.0.0b36 on Hopper gives a query gradient that has little to do with the right one (cosine 0.1 to 0.5)
# where heads have 16 features; with 32, 64 and 128 it is as exact as FlashAttention 2 (docs/benchmarks/multi_gpu.md).
FLASH_FEATURES = 32
SHORT = 1024  # mean queries per segment; below it, launches and repeated keys cost more than the attention


@cache
def attention_backend() -> Backend:
    """What attention runs on here: FlashAttention 4 where it is installed on a GPU, else cuDNN, else torch."""
    if not torch.cuda.is_available():
        return "sdpa"
    return "flash_attention_4" if find_spec("flash_attn") and find_spec("flash_attn.cute") else "cudnn"


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention of each segment's queries to its own keys, unmasked inside a segment.

    Args:
        q: [query tokens, heads, d].
        k, v: [key tokens, heads, d].

    Returns:
        [query tokens, heads, d], contiguous.
    """
    if attention_backend() == "sdpa":
        return _batched_attention(q, k, v, segments)
    if q.shape[0] < SHORT * len(segments.q_lengths) and q.dtype in (torch.bfloat16, torch.float16):
        return _short_attention(q, k, v, segments)
    k, v, segments = _repeated(k, segments), _repeated(v, segments), _whole(segments)
    flash = attention_backend() == "flash_attention_4" and q.shape[-1] >= FLASH_FEATURES
    if flash and q.dtype in (torch.bfloat16, torch.float16):
        return _flash_attention(q, k, v, segments)
    pieces = zip(*_split(q, k, v, segments), strict=True)
    return torch.cat([_cudnn_attention(*piece) for piece in pieces if piece[0].shape[0]])


def block_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Attention of queries to a part of their keys, for `ring`: what it would be if these were all of them.

    Args:
        segments: none of them empty.

    Returns:
        [query tokens, heads, d], and the logarithm of each row's sum of exponentials, [query tokens, heads] float32.
    """
    if q.is_cuda:
        assert q.shape[-1] >= FLASH_FEATURES, q.shape
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(q, k, v, **_varlen(segments, q.device), return_lse=True)
        return out, lse.T
    outs, lses = [], []
    for queries, keys, values in zip(*_split(q, k, v, segments), strict=True):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by way of one part of the keys.

    Args:
        out, lse: of the attention to all keys; the part's probabilities follow from them.
    """
    if q.is_cuda:
        from flash_attn.cute.interface import _flash_attn_bwd

        return _flash_attn_bwd(q, k, v, out, grad, lse.T.contiguous(), **_varlen(segments, q.device))
    scale = q.shape[-1] ** -0.5
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    whole = (x.split(segments.q_lengths) for x in (grad, out, lse))
    for queries, keys, values, g, o, row in zip(*_split(q, k, v, segments), *whole, strict=True):
        p = (torch.einsum("qhd,khd->hqk", queries, keys) * scale - row.T[..., None]).exp()
        along = (g * o).sum(-1).T[..., None]
        through = p * (torch.einsum("qhd,khd->hqk", g, values) - along) * scale
        grad_q = torch.einsum("hqk,khd->qhd", through, keys)
        grads.append((grad_q, torch.einsum("hqk,qhd->khd", through, queries), torch.einsum("hqk,qhd->khd", p, g)))
    grad_q, grad_k, grad_v = (torch.cat(parts) for parts in zip(*grads, strict=True))
    return grad_q, grad_k, grad_v


def _varlen(segments: Segments, device: torch.device) -> dict[str, Any]:
    """FlashAttention's names for the boundaries."""
    cu_q, cu_k = segments.cu_seqlens(device)
    return {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(segments.q_lengths), "max_seqlen_k": max(segments.k_lengths),
    }  # fmt: skip


def _split(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Sequence[Tensor], ...]:
    return q.split(segments.q_lengths), k.split(segments.k_lengths), v.split(segments.k_lengths)


def _repeated(x: Tensor, segments: Segments) -> Tensor:
    """Keys or values with each segment's last row as often as it counts; its gradient is their sum."""
    if segments.last_key_counts is None:
        return x
    rows = zip(x.split(segments.k_lengths), segments.last_key_counts, strict=True)
    return torch.cat([part for row, count in rows for part in (row[:-1], row[-1:].expand(count, -1, -1))])


def _whole(segments: Segments) -> Segments:
    counts = segments.last_key_counts or (1,) * len(segments.k_lengths)
    return Segments(
        segments.q_lengths, tuple(n + count - 1 for n, count in zip(segments.k_lengths, counts, strict=True))
    )


def _short_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """One launch for many short segments: torch's variable-length FlashAttention 2, which knows no bias of a score.

    Keys that count more than once get theirs through features that queries have as ones, see `_with_counts`.
    """
    from torch.nn.attention.varlen import varlen_attn

    dim = q.shape[-1]
    q, k, v = _with_counts(q, k, v, segments)
    cu_q, cu_k = segments.cu_seqlens(q.device)
    out = varlen_attn(q, k, v, cu_q, cu_k, max(segments.q_lengths), max(segments.k_lengths), scale=dim**-0.5)
    assert isinstance(out, Tensor)  # it returns more where it is asked for more
    return out[..., :dim].contiguous()


def _with_counts(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [tokens, heads, d] with 8 more features, if any key counts n > 1 times.

    Attention at the scale of d ** -0.5 then raises that key's score by log n: the query's features are 1, the key's
    are log(n) * d ** 0.5 in two parts, which together have twice the digits of q's dtype.
    """
    if segments.last_key_counts is None:
        return q, k, v
    last = torch.tensor(segments.k_lengths).cumsum(0) - 1
    bias = torch.zeros(k.shape[0])
    bias[last] = torch.tensor(segments.last_key_counts, dtype=torch.float32).log() * q.shape[-1] ** 0.5
    bias = bias.to(q.device, non_blocking=True)
    high = bias.to(q.dtype)
    pair = torch.stack((high, (bias - high.float()).to(q.dtype)), dim=-1)[:, None]  # [keys, 1, 2]
    ones = q.new_ones(1, 1, 2).expand(q.shape[0], q.shape[1], 2)
    return (
        torch.cat((q, F.pad(ones, (0, 6))), dim=-1),
        torch.cat((k, F.pad(pair.expand(-1, k.shape[1], -1), (0, 6))), dim=-1),
        F.pad(v, (0, 8)),
    )


def _batched_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Torch's attention, one call for all segments of equal lengths: on a CPU the calls cost more than small sums do.

    A key that counts n times is a key whose score is raised by log n.
    """
    counts = segments.last_key_counts or (1,) * len(segments.k_lengths)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, lengths in enumerate(zip(segments.q_lengths, segments.k_lengths, counts, strict=True)):
        if lengths[0]:
            alike.setdefault(lengths, []).append(index)
    parts = _split(q, k, v, segments)
    outputs: dict[int, Tensor] = {}
    for (_, k_length, count), members in alike.items():
        qs, ks, vs = (torch.stack([part[index] for index in members]).transpose(1, 2) for part in parts)
        bias = torch.zeros(1, k_length, dtype=q.dtype, device=q.device)
        bias[0, -1] = math.log(count)
        out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=bias if count > 1 else None)
        outputs |= zip(members, out.transpose(1, 2).unbind(), strict=True)
    return torch.cat([outputs[index] for index in sorted(outputs)])


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).contiguous()


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if len(segments.q_lengths) == 1:  # the dense kernel is up to 10 % faster than the variable-length one
        out = flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)
    out = flash_attn_varlen_func(q, k, v, **_varlen(segments, q.device))
    return out[0] if isinstance(out, tuple) else out
