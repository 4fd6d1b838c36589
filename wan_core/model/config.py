"""WAN's architecture as a megatron-core TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from wan_core.architecture import Architecture
from wan_core.layout import check_layout


@dataclass
class WanTransformerConfig(TransformerConfig):
    """TransformerConfig with WAN's own sizes.

    Weights are initialised by `WanModel.initialize`, not by the layers, so that they do not depend on the layout.
    """

    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int = 0  # see Architecture
    init_seed: int = 1234
    embedder_init_std: float = 0.02  # of the text and time MLPs; WAN's own, made for widths of thousands

    def __post_init__(self) -> None:
        check_layout(self)
        self.perform_initialization = False
        self.has_cond_embedder = True  # megatron sums the replicated embedders' gradients over pipeline stages
        self.variable_seq_lengths = True  # packs differ in length
        self.moe_token_dispatcher_type = "alltoall"  # no experts here, but megatron checks it beside the line above
        self.recompute_modules: list[str] = []  # megatron's default names parts of its own blocks
        self.calculate_per_token_loss = True  # the loss is a mean over the global batch's real tokens
        self.activation_func = F.gelu
        self.add_bias_linear = True
        self.attention_dropout = self.hidden_dropout = 0.0
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        cuda = torch.cuda.is_available() and not self.use_cpu_initialization
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def architecture(self) -> Architecture:
        return Architecture(
            self.hidden_size, self.ffn_hidden_size, self.num_attention_heads, self.num_layers, self.in_channels,
            self.out_channels, self.text_dim, self.freq_dim, self.layernorm_epsilon, self.image_dim,
        )  # fmt: skip

    @classmethod
    def of(cls, architecture: Architecture, **values: Any) -> WanTransformerConfig:
        """The config of an architecture; `values` are TransformerConfig fields (dtype, layout, recomputation)."""
        return cls(**architecture_fields(architecture), **values)


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """An architecture in TransformerConfig's field names."""
    return {
        "hidden_size": architecture.hidden_size, "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads, "num_layers": architecture.num_layers,
        "in_channels": architecture.in_channels, "out_channels": architecture.out_channels,
        "text_dim": architecture.text_dim, "freq_dim": architecture.freq_dim, "layernorm_epsilon": architecture.eps,
        "image_dim": architecture.image_dim,
    }  # fmt: skip
