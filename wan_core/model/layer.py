"""One transformer block."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from wan_core.model.attention import MLP, CrossAttention, SelfAttention
from wan_core.model.config import WanTransformerConfig
from wan_core.model.ops import AffineLayerNorm, gated_add, modulated_norm
from wan_core.packing import Packing
from wan_core.parallel import Parallel


class WanLayer(MegatronModule):
    """Self-attention and MLP, modulated and gated per sample; between them cross-attention to the text."""

    def __init__(self, config: WanTransformerConfig, parallel: Parallel) -> None:
        super().__init__(config)
        h, device = config.hidden_size, config.device
        self.modulation = nn.Parameter(torch.zeros(6, h, dtype=torch.float32, device=device))
        self.self_attention = SelfAttention(config, parallel)
        self.cross_norm = AffineLayerNorm(h, config.layernorm_epsilon, device)
        self.cross_attention = CrossAttention(config, parallel)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, image: Tensor | None, rotary: Tensor,
        lengths: tuple[int, ...], packing: Packing,
    ) -> Tensor:  # fmt: skip
        """x [local tokens, h], modulation [samples, 6, h] float32, text and image [rows, h] -> [local tokens, h].

        lengths: how many of x's tokens belong to each sample. Under sequence parallelism x is this TP rank's share of
        the tokens in packing.
        """
        eps = self.config.layernorm_epsilon
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(1)  # [samples, h] each
        attended = self.self_attention(modulated_norm(x, shift1, scale1, lengths, eps), rotary, packing)
        x = gated_add(x, attended, gate1, lengths)
        x = x + self.cross_attention(self.cross_norm(x), text, image, packing)
        fed = self.mlp(modulated_norm(x, shift2, scale2, lengths, eps))
        return gated_add(x, fed, gate2, lengths)
