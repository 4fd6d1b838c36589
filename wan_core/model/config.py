"""WAN's architecture as a megatron-core TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from wan_core.architecture import Architecture
from wan_core.config import check


@dataclass
class WanTransformerConfig(TransformerConfig):
    """TransformerConfig with WAN's own sizes.

    Weights are initialised by `WanModel.initialize`, not by the layers, so that they do not depend on the layout.
    """

    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
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
            self.out_channels, self.text_dim, self.freq_dim, self.layernorm_epsilon,
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
    }  # fmt: skip


def check_layout(config: TransformerConfig) -> None:
    """Refuse a layout that cannot work, before processes or groups exist.

    Raises:
        ValueError: heads or the feed-forward width do not divide over the ranks, or stages outnumber layers.
    """
    heads, layers = config.num_attention_heads, config.num_layers
    tp, cp, pp = config.tensor_model_parallel_size, config.context_parallel_size, config.pipeline_model_parallel_size
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    check(
        heads % tp == 0,
        f"num_attention_heads={heads} is not divisible by tensor_model_parallel_size={tp}; choose one of {divisors}",
    )
    check(
        config.cp_comm_type in (None, "a2a", "p2p"),
        f"cp_comm_type={config.cp_comm_type!r} is neither a2a, which exchanges heads (Ulysses, also when left out), "
        "nor p2p, a ring that passes on keys and values; choose one of them",
    )
    check(
        config.recompute_granularity in (None, "selective", "full"),
        f"recompute_granularity={config.recompute_granularity!r} is neither selective nor full; choose one, or leave "
        "it out",
    )
    check(
        not config.recompute_modules,
        f"recompute_modules={config.recompute_modules} names parts of megatron's own blocks; leave it out: selective "
        "recomputes norms, rotations, GELU and gated adds",
    )
    check(
        config.cp_comm_type == "p2p" or heads % (tp * cp) == 0,
        f"num_attention_heads={heads} is not divisible by tensor_model_parallel_size={tp} x "
        f"context_parallel_size={cp}, which exchanges heads; choose a product among {divisors}, or cp_comm_type=p2p",
    )
    check(
        config.ffn_hidden_size is None or config.ffn_hidden_size % tp == 0,
        f"ffn_hidden_size={config.ffn_hidden_size} is not divisible by tensor_model_parallel_size={tp}",
    )
    check(pp <= layers, f"pipeline_model_parallel_size={pp} exceeds num_layers={layers}; choose {layers} or less")
    check(
        not config.sequence_parallel or tp > 1,
        f"sequence_parallel=true needs tensor_model_parallel_size > 1, which is {tp}; set sequence_parallel=false",
    )
