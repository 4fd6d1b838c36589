"""The encoder of diffusers' AutoencoderKLWan, arranged for GPUs: channels last, many frames at a time, few passes.

diffusers encodes 1 + 4 + 4 + ... frames, each convolution keeping the last two frames of its input for the next chunk.
The sums do not depend on where the chunks end, so chunks of many frames give the same latents up to rounding. Weights
are those of the diffusers model; what is rearranged is where a value lies and in which kernel it is computed.

Activations are [B, T, H, W, C]. The input of a 3x3x3 convolution is `padded`: [terms, B, 2 + T, H + 2, W + 2, C], two
frames of the past in front (zeros before the first frame) and a border of zeros around. Two terms are a value's 16-bit
rounding and the rounding of what that left: three products of such halves are nearly as exact as one of float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.config import VAE_TEMPORAL_STRIDE
from wan_core.encode.vae_precision import F32, Precision, allow_tf32, halved, to_float

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and a run whose stages are all cached needs none
    from diffusers import AutoencoderKLWan

MAX_ELEMENTS = 3 << 28  # of the largest activation, where chunks can be so short: 18 frames of 480x832
MAX_OFFSET = 1 << 31  # kernels count elements in 32 bits


@dataclass
class Pending:
    """A sum that the next kernel forms while it reads: x + bias + residual."""

    x: Tensor  # [B, T, H, W, C]
    bias: Tensor | None = None  # float32 [C]
    residual: Tensor | None = None  # [B, T, H, W, C]


@dataclass
class Past:
    """The last frames of each convolution's input, by the convolution's name; empty at the start of a clip."""

    frames: dict[str, Tensor] = field(default_factory=dict)


class FastEncoder:
    """Posterior mean of an AutoencoderKLWan.

    Raises:
        ValueError: the model has parts that this arrangement lacks.
    """

    def __init__(self, model: AutoencoderKLWan, precision: Precision) -> None:
        if reason := unsupported(model):
            raise ValueError(f"this VAE {reason}, which only diffusers' own encoder computes; choose vae_dtype=float32")
        self.model, self.precision = model, precision
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.terms: dict[str, int] = {}  # of 3x3x3 convolutions
        widest = model.encoder.conv_out.in_channels
        for name, module in [*model.encoder.named_modules(), ("quant_conv", model.quant_conv)]:
            if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
                continue
            assert module.bias is not None, f"{name} has no bias"
            weight, self.biases[name] = module.weight.detach().float(), module.bias.detach().float()
            if name in ("conv_out", "quant_conv"):  # 0.1 % of the work: in float32 they add no error of their own
                self.weights[name] = weight
            elif tuple(module.kernel_size) == (3, 3, 3):
                chosen = name == "conv_in" or module.out_channels == widest
                self.terms[name] = 2 if {"none": False, "widest": chosen, "all": True}[precision.two_terms] else 1
                self.weights[name] = self._arranged(weight, self.terms[name])
            else:
                layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
                self.weights[name] = weight.to(precision.other, memory_format=layout)

    def _arranged(self, weight: Tensor, terms: int) -> Tensor:
        """For the kernel a table, else the terms of [out, in, 3, 3, 3]."""
        weight = F.pad(weight, (0, 0) * 3 + (0, -weight.shape[1] % 8))  # RGB becomes 8 channels, 5 of them zero
        if self._has_kernel(weight):
            from wan_core.encode.vae_kernels import conv_table

            return conv_table(weight, self.precision.product, terms)
        return torch.stack(halved(weight, self.precision.product, terms))

    def _has_kernel(self, weight: Tensor) -> bool:
        """On GPUs, in 16 bits, at the widths of the published VAE."""
        return weight.is_cuda and self.precision.product != F32 and weight.shape[0] % 96 == 0

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Posterior mean, before the latents' normalisation.

        Args:
            video: [B, T, H, W, 3] on the model's device, float in [-1, 1] or uint8, T = 4n + 1.

        Returns:
            float32 [B, z, (T - 1) / 4 + 1, H / 8, W / 8].
        """
        past = Past()
        with allow_tf32(self.precision.tf32):
            means = [self._chunk(video[:, start:end], past) for start, end in self._chunks(video)]
        return torch.cat(means, 1).permute(0, 4, 1, 2, 3)

    def _chunks(self, video: Tensor) -> list[tuple[int, int]]:
        """Bounds of chunks of 1 + 4n, 4n, 4n... frames that keep activations below MAX_ELEMENTS."""
        batch, length, height, width, _ = video.shape
        step = (
            max((MAX_ELEMENTS // (batch * self._frame(height, width)) - 3) // VAE_TEMPORAL_STRIDE, 1)
            * VAE_TEMPORAL_STRIDE
        )
        starts = [0, *range(1 + step, length, step)]
        return list(zip(starts, [*starts[1:], length], strict=True))

    def _frame(self, height: int, width: int) -> int:
        """Elements of a frame of the largest activation, with its border."""
        patch = self.model.config.patch_size or 1
        return (height // patch + 2) * (width // patch + 2) * self.model.config.base_dim

    def fits(self, length: int, height: int, width: int) -> bool:
        """Whether the shortest first chunk of a clip, with its past, is within reach of the kernels' offsets."""
        frames = 2 + min(length, 1 + VAE_TEMPORAL_STRIDE)
        return self.terms["down_blocks.0.conv1"] * frames * self._frame(height, width) < MAX_OFFSET

    def _chunk(self, frames: Tensor, past: Past) -> Tensor:
        encoder = self.model.encoder
        padded = torch.stack(halved(self._pixels(frames), self.precision.product, self.terms["conv_in"]))
        padded = F.pad(padded, (0, 0, 1, 1, 1, 1, 2, 0))
        self._remember(padded, "conv_in", past)
        stream = Pending(self._conv3(padded, "conv_in"), self.biases["conv_in"])
        for i, block in enumerate(encoder.down_blocks):
            name = f"down_blocks.{i}"
            stream = (self._resample if hasattr(block, "resample") else self._residual)(block, name, stream, past)
        stream = self._residual(encoder.mid_block.resnets[0], "mid_block.resnets.0", stream, past)
        stream = self._attention(encoder.mid_block.attentions[0], "mid_block.attentions.0", stream)
        stream = self._residual(encoder.mid_block.resnets[1], "mid_block.resnets.1", stream, past)
        padded, _ = self._norm_silu(stream, encoder.norm_out, "conv_out", past)
        with allow_tf32(False):
            out = F.conv3d(padded[0].permute(0, 4, 1, 2, 3), self.weights["conv_out"], self.biases["conv_out"])
            moments = F.conv3d(out, self.weights["quant_conv"], self.biases["quant_conv"])
        return moments.permute(0, 2, 3, 4, 1)[..., : self.model.config.z_dim]

    def _pixels(self, frames: Tensor) -> Tensor:
        """[B, T, H, W, 3] to [B, T, H, W, 8] in [-1, 1], the channels (of patches, if the VAE has any) filled up."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        x = to_float(frames)
        if patch := self.model.config.patch_size:
            x = patchify(x.permute(0, 4, 1, 2, 3), patch).permute(0, 2, 3, 4, 1)
        return F.pad(x, (0, -x.shape[-1] % 8))

    def _residual(self, block: Any, name: str, stream: Pending, past: Past) -> Pending:
        """conv2(silu(norm2(conv1(silu(norm1(x)))))) + shortcut(x)."""
        padded, x = self._norm_silu(stream, block.norm1, f"{name}.conv1", past)
        hidden = Pending(self._conv3(padded, f"{name}.conv1"), self.biases[f"{name}.conv1"])
        padded, _ = self._norm_silu(hidden, block.norm2, f"{name}.conv2", past, keep=False)
        out, bias = self._conv3(padded, f"{name}.conv2"), self.biases[f"{name}.conv2"]
        if isinstance(block.conv_shortcut, nn.Identity):
            return Pending(out, bias, x)
        shortcut = F.linear(x.to(self.precision.other), self.weights[f"{name}.conv_shortcut"].flatten(1))
        return Pending(out, bias + self.biases[f"{name}.conv_shortcut"], shortcut)

    def _resample(self, block: Any, name: str, stream: Pending, past: Past) -> Pending:
        """Half the height and width, and half the frames but the clip's first, which stays by itself."""
        batch, length = stream.x.shape[:2]
        bordered, _ = self._padded(stream, None, 0, 0, False, self.precision.other, 1)
        images = bordered[0].flatten(0, 1).permute(0, 3, 1, 2)
        x = F.conv2d(images, self.weights[f"{name}.resample.1"], stride=2).permute(0, 2, 3, 1)
        x, bias = x.unflatten(0, (batch, length)), self.biases[f"{name}.resample.1"]
        if block.mode == "downsample2d":
            return Pending(x, bias)
        x = (x.float() + bias).to(self.precision.other)
        first, before = name not in past.frames, past.frames.get(name)
        past.frames[name] = x[:, -1:].clone()
        if first and length == 1:
            return Pending(x)
        joined = (x if before is None else torch.cat([before, x], 1)).permute(0, 4, 1, 2, 3)
        out = F.conv3d(
            joined, self.weights[f"{name}.time_conv"], self.biases[f"{name}.time_conv"].to(x.dtype), (2, 1, 1)
        )
        out = out.permute(0, 2, 3, 4, 1)
        return Pending(torch.cat([x[:, :1], out], 1) if first else out)

    def _attention(self, block: Any, name: str, stream: Pending) -> Pending:
        """One head over the pixels of each frame."""
        x = _sum(stream)
        batch, length, height, width, channels = x.shape
        rows = F.normalize(x, dim=-1) * block.norm.scale * block.norm.gamma.flatten()
        rows = rows.to(self.precision.other).view(batch * length, height * width, channels)
        qkv = F.linear(rows, self.weights[f"{name}.to_qkv"].flatten(1), self.biases[f"{name}.to_qkv"].to(rows.dtype))
        q, k, v = qkv.chunk(3, -1)
        # Heads this wide have no fast fused attention; the scores of a few frames fit.
        scores = torch.softmax((q @ k.mT).float() * channels**-0.5, -1)
        out = F.linear(scores.to(v.dtype) @ v, self.weights[f"{name}.proj"].flatten(1))
        return Pending(out.view(x.shape), self.biases[f"{name}.proj"], x)

    def _norm_silu(self, stream: Pending, norm: Any, name: str, past: Past, keep: bool = True) -> tuple[Tensor, Tensor]:
        """silu(norm(sum)), padded as the input of convolution `name`; and the sum, unless nobody needs it."""
        gamma = norm.gamma.detach().float().flatten() * norm.scale
        dtype = F32 if name == "conv_out" else self.precision.product
        padded, total = self._padded(stream, gamma, 2, 1, keep, dtype, self.terms.get(name, 1))
        self._remember(padded, name, past)
        return padded, total

    def _padded(
        self, stream: Pending, gamma: Tensor | None, past: int, before: int, keep: bool, dtype: torch.dtype, terms: int
    ) -> tuple[Tensor, Tensor]:
        """The sum, through norm and SiLU if gamma is given, with `past` frames and `before` lines free in front."""
        batch, length, height, width, channels = stream.x.shape
        shape = (terms, batch, past + length, before + height + 1, before + width + 1, channels)
        padded = stream.x.new_empty(shape, dtype=dtype)
        total = stream.x.new_empty(stream.x.shape, dtype=F32) if keep else stream.x
        if stream.x.is_cuda:
            from wan_core.encode.vae_kernels import write_padded

            write_padded(stream.x, stream.bias, stream.residual, gamma, padded, total if keep else None)
        else:
            x = _sum(stream)
            inner = x if gamma is None else F.silu(F.normalize(x, dim=-1) * gamma)
            padded.zero_()
            padded[:, :, past:, before:-1, before:-1] = torch.stack(halved(inner, dtype, terms))
            if keep:
                total.copy_(x)
        return padded, total

    def _remember(self, padded: Tensor, name: str, past: Past) -> None:
        """Put the past in front of `padded`, and keep its last two frames for the next chunk."""
        if name in past.frames:
            padded[:, :, :2] = past.frames[name]
        else:
            padded[:, :, :2].zero_()
        past.frames[name] = padded[:, :, -2:].clone()

    def _conv3(self, padded: Tensor, name: str) -> Tensor:
        """A 3x3x3 convolution without its bias: [terms, B, 2 + T, H + 2, W + 2, C] to [B, T, H, W, out]."""
        weight, partial = self.weights[name], self.precision.partial
        if weight.ndim == 2:
            from wan_core.encode.vae_kernels import conv3

            return conv3(padded, weight, partial)
        x, w = padded.float().permute(0, 1, 5, 2, 3, 4), weight.float()
        with allow_tf32(False):
            out = F.conv3d(x[0], w[0])
            if len(x) == 2:
                out = out + F.conv3d(x[0], w[1]) + F.conv3d(x[1], w[0])
        return out.permute(0, 2, 3, 4, 1).to(partial)


def unsupported(model: AutoencoderKLWan) -> str | None:
    """Why `FastEncoder` cannot stand in for a model's encoder; None if it can."""
    if model.config.is_residual:
        return "has residual down blocks (WAN 2.2)"
    if model.config.attn_scales:
        return f"has attention at scales {model.config.attn_scales}"
    return None


def _sum(stream: Pending) -> Tensor:
    """float32 [B, T, H, W, C]."""
    total = stream.x.float()
    for term in (stream.bias, stream.residual):
        total = total if term is None else total + term
    return total
