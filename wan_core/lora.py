"""Low-rank adapters through Megatron-Bridge's `peft`, on the linear layers of the blocks."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.dora_layers import DoRALinear
from megatron.bridge.peft.lora import LoRA
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from wan_core.config import check
from wan_core.parallel import Parallel

TARGETS = ("linear_qkv", "linear_q", "linear_kv", "linear_image_kv", "linear_proj", "linear_fc1", "linear_fc2")


class _Reproducible:
    """Adapters whose first weights do not depend on the layout, and which leave the base where it is."""

    def __call__(self, model: Any, training: bool = True) -> Any:
        model = super().__call__(model, training)  # type: ignore[misc]
        for chunk in model if isinstance(model, list) else [model]:
            initialize(chunk, chunk.config.init_seed)
        return model


@dataclass
class WanLoRA(_Reproducible, LoRA):
    """y = W x + b + alpha / dim * B A x."""

    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    dim: int = 32
    alpha: int = 32


@dataclass
class WanDoRA(_Reproducible, DoRA):
    """LoRA of the rows' directions, with their lengths m beside: y = m / |W + s B A| (W + s B A) x + b."""

    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    dim: int = 32
    alpha: int = 32

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        adapted = super().transform(m, name, prefix)
        if type(adapted) is DoRALinear:
            adapted.__class__ = FlatDoRALinear
            adapted.spread()
        return adapted


class FlatDoRALinear(DoRALinear):
    """Bridge's, for activations [tokens, features] (it expects three dimensions), layers with a bias (it scales the
    bias with the weight, which the method and every reader of its checkpoints leave alone) and tensor parallelism
    (where rows are split, it takes a part's length for the row's)."""

    def spread(self) -> None:
        """Tell Megatron how the lengths are shared, and start them at those of whole rows."""
        magnitude = self.adapter.weight_magnitude
        magnitude.data.copy_(self._get_weight_norm())
        if self.adapter.input_is_parallel:  # all lengths on every rank, which may see its own tokens alone
            magnitude.sequence_parallel = self.to_wrap.config.sequence_parallel  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(magnitude, True, 0, 1)

    def _get_weight_norm(self) -> Tensor:
        norm: Tensor = super()._get_weight_norm()
        parallel = Parallel.current()
        if parallel.tp == 1 or not self.adapter.input_is_parallel:
            return norm
        squares = norm.float().square()
        dist.all_reduce(squares, group=parallel.tp_group)
        return squares.sqrt().to(norm.dtype)

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, None]:
        out, _ = self.to_wrap(x)
        if not self._adapter_enabled:
            return out, None
        bias = self.to_wrap.bias
        scale = self.adapter.get_weight_magnitude() / self._get_weight_norm()
        return bias + scale * (out - bias + self.adapter(x.contiguous())), None


@dataclass(frozen=True)
class LoraConfig:
    """The `lora` section of a training config."""

    dim: int = 0  # rank of the adapters; 0: train the weights themselves
    alpha: int = 0  # scale of what they add is alpha / dim; 0: as dim
    dropout: float = 0.0
    magnitude: bool = False  # DoRA
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        check(self.dim >= 0, f"lora.dim={self.dim} is negative; choose 32, or 0 for none")
        unknown = [name for name in self.targets if name.split(".")[-1] not in TARGETS]
        check(not unknown, f"lora.targets holds {unknown}; choose among {', '.join(TARGETS)}")
        check(not (self.magnitude and self.dropout), "lora.magnitude=true takes no lora.dropout; set it to 0")

    def adapters(self) -> WanLoRA | WanDoRA | None:
        """Bridge's `peft` section."""
        if not self.dim:
            return None
        kind = WanDoRA if self.magnitude else WanLoRA
        return kind(
            target_modules=list(self.targets), dim=self.dim, alpha=self.alpha or self.dim, dropout=self.dropout,
        )  # fmt: skip


@torch.no_grad()
def initialize(model: Any, seed: int) -> None:
    """Kaiming-uniform A, as peft's; B is zero. Every A draws from a generator seeded by its name, keeps its slice."""
    for name, parameter in model.named_parameters():
        if not name.endswith("adapter.linear_in.weight"):
            continue
        shape, dim = list(parameter.shape), parameter.partition_dim
        parallel = model.parallel
        shape[dim] *= parallel.tp
        number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        generator = torch.Generator(parameter.device).manual_seed(number)
        whole = torch.empty(shape, device=parameter.device)
        bound = math.sqrt(1 / shape[1])
        whole.uniform_(-bound, bound, generator=generator)
        parameter.copy_(whole.chunk(parallel.tp, dim)[parallel.tp_rank])
