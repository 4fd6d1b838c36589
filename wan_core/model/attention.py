"""Self- and cross-attention over packed sequences."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from wan_core.model.config import WanTransformerConfig
from wan_core.model.kernels import packed_attention
from wan_core.model.ops import exchange_heads, exchange_tokens, gelu, head_norm
from wan_core.model.ring import ring_attention
from wan_core.packing import Packing
from wan_core.parallel import Parallel


class _AddsBiasFirst:
    """A parallel layer on one tensor-parallel rank: the bias is added before the product is rounded, as torch and
    Transformer Engine do. Megatron adds it after, which in bfloat16 makes a layer's error larger by a sixth."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class WholeColumnLinear(_AddsBiasFirst, ColumnParallelLinear):
    """All output features on one rank."""


class WholeRowLinear(_AddsBiasFirst, RowParallelLinear):
    """All input features on one rank."""


def column_linear(config: WanTransformerConfig, width: int, out: int, gather_input: bool = True) -> nn.Module:
    """Linear whose output features are split over TP. `gather_input=False`: its input is whole on every rank, also
    under sequence parallelism, as text is."""
    if not gather_input and config.sequence_parallel:
        config = copy.copy(config)
        config.sequence_parallel = False
    arguments: dict[str, Any] = {"config": config, "init_method": _no_init, "bias": True, "gather_output": False}
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear(width, out, **arguments, skip_bias_add=False, is_expert=False)
    kind = WholeColumnLinear if config.tensor_model_parallel_size == 1 else ColumnParallelLinear
    return kind(width, out, **arguments)


def row_linear(config: WanTransformerConfig, width: int, out: int) -> nn.Module:
    """Linear whose input features are split over TP; its output is summed, and scattered under sequence parallelism."""
    arguments: dict[str, Any] = {
        "config": config, "init_method": _no_init, "bias": True, "input_is_parallel": True, "skip_bias_add": False,
    }  # fmt: skip
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        return TERowParallelLinear(width, out, **arguments, is_expert=False)
    kind = WholeRowLinear if config.tensor_model_parallel_size == 1 else RowParallelLinear
    return kind(width, out, **arguments)


def _no_init(weight: Tensor) -> None:
    """Layers leave their weights to `WanModel.initialize`."""


class QKNorm(MegatronModule):
    """Weight of an RMSNorm over all heads of q or k; each rank holds its own heads' slice."""

    def __init__(self, config: WanTransformerConfig, parallel: Parallel) -> None:
        super().__init__(config)
        width = config.hidden_size // parallel.tp
        self.weight = nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=config.device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class SelfAttention(MegatronModule):
    """Attention of each sample's tokens to one another.

    The rows of `linear_qkv` are ordered (head, q|k|v, d), so that a TP shard is a contiguous block of whole heads.
    """

    def __init__(self, config: WanTransformerConfig, parallel: Parallel) -> None:
        super().__init__(config)
        self.parallel = parallel
        self.linear_qkv = column_linear(config, config.hidden_size, 3 * config.hidden_size)
        self.q_norm = QKNorm(config, parallel)
        self.k_norm = QKNorm(config, parallel)
        self.linear_proj = row_linear(config, config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, packing: Packing) -> Tensor:
        """x [local tokens, h] -> [local tokens, h]."""
        eps, head_dim = self.config.layernorm_epsilon, self.config.kv_channels
        qkv = self.linear_qkv(x)[0]
        weights = self.q_norm.weight, self.k_norm.weight
        parts = qkv.unflatten(-1, (-1, 3, head_dim))
        q, k, v = head_norm(parts, weights, rotary, eps, self.parallel)  # [tokens / cp, heads / tp, d] each
        return self.linear_proj(self._attend(q, k, v, packing).flatten(1))[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """[tokens / cp, heads / tp, d] each -> the same shape."""
        if self.parallel.cp == 1:
            return packed_attention(q, k, v, packing.self_segments)
        if self.config.cp_comm_type == "p2p":
            return ring_attention(q, k, v, packing, self.parallel)
        q, k, v = exchange_heads(q, k, v, self.parallel)  # [tokens, heads / tp / cp, d] each
        return exchange_tokens(packed_attention(q, k, v, packing.self_segments), self.parallel)


class CrossAttention(MegatronModule):
    """Attention of each sample's tokens to its text, and in an image-to-video model to its image: each by itself, with
    the same queries, and added. The rows of `linear_kv` and `linear_image_kv` are ordered (head, k|v, d).
    """

    def __init__(self, config: WanTransformerConfig, parallel: Parallel) -> None:
        super().__init__(config)
        self.parallel = parallel
        self.linear_q = column_linear(config, config.hidden_size, config.hidden_size)
        self.linear_kv = column_linear(config, config.hidden_size, 2 * config.hidden_size, gather_input=False)
        self.q_norm = QKNorm(config, parallel)
        self.k_norm = QKNorm(config, parallel)
        if config.image_dim:
            self.linear_image_kv = column_linear(config, config.hidden_size, 2 * config.hidden_size, gather_input=False)
            self.image_k_norm = QKNorm(config, parallel)
        self.linear_proj = row_linear(config, config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, packing: Packing) -> Tensor:
        """x [local tokens, h], text [text rows, h], image [image rows, h] -> [local tokens, h]."""
        eps, head_dim = self.config.layernorm_epsilon, self.config.kv_channels
        q = self.linear_q(x)[0].unflatten(-1, (-1, 1, head_dim))
        kv = self.linear_kv(text)[0].unflatten(-1, (-1, 2, head_dim))
        (q,) = head_norm(q, (self.q_norm.weight,), None, eps, self.parallel)
        k, v = head_norm(kv, (self.k_norm.weight,), None, eps, self.parallel)
        out = packed_attention(q, k, v, packing.cross_segments)
        if image is not None:
            kv = self.linear_image_kv(image)[0].unflatten(-1, (-1, 2, head_dim))
            k, v = head_norm(kv, (self.image_k_norm.weight,), None, eps, self.parallel)
            out = out + packed_attention(q, k, v, packing.image_segments)
        return self.linear_proj(out.flatten(1))[0]


class MLP(MegatronModule):
    """Linear, GELU (tanh), linear."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__(config)
        assert config.ffn_hidden_size is not None
        self.linear_fc1 = column_linear(config, config.hidden_size, config.ffn_hidden_size)
        self.linear_fc2 = row_linear(config, config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(gelu(self.linear_fc1(x)[0]))[0]
