"""GPUs, and how a training step is spread over them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from wan_core.architecture import Architecture
from wan_core.config import check


@dataclass(frozen=True)
class Device:
    """What one GPU and its links reach in practice: measured rates, not those of the data sheet."""

    memory_gib: float
    matmul: float  # FLOP/s of a large product
    matmul_half: float  # a product of M x N x K takes 1 + half (1/M + 1/N + 1/K) times as long as at that rate
    attention_forward: float  # FLOP/s of self-attention, by FlashAttention 4
    attention_backward: float  # 2.5 times the forward's FLOPs
    memory: float  # bytes/s of a copy, read and written
    node_link: float  # bytes/s of a collective inside a node, as NCCL's bus bandwidth
    network: float  # the same between nodes
    latency: float = 20e-6  # s of a collective


DEVICES = {
    "h200": Device(139.8, 800e12, 206, 684e12, 640e12, 4.0e12, 260e9, 45e9),
    "h100": Device(79.1, 760e12, 206, 650e12, 608e12, 2.7e12, 260e9, 45e9),  # an H200's chip, 95 % of it
}


@dataclass(frozen=True)
class Layout:
    """How a training step is spread over ranks."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    ring: bool = False  # context parallelism passes on keys and values instead of exchanging heads
    fsdp: bool = False
    recompute: str | None = None  # selective or full
    recompute_layers: int = 0  # of a stage, with full

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def shards(self) -> int:
        """Ranks that share optimizer state, and with FSDP everything."""
        return self.dp * self.cp

    def settings(self) -> dict[str, Any]:
        """The model's config fields."""
        values: dict[str, Any] = {
            "tensor_model_parallel_size": self.tp, "sequence_parallel": self.sequence_parallel,
            "context_parallel_size": self.cp, "pipeline_model_parallel_size": self.pp,
            "cp_comm_type": ("p2p" if self.ring else "a2a") if self.cp > 1 else None,
            "recompute_granularity": self.recompute, "recompute_method": None, "recompute_num_layers": None,
        }  # fmt: skip
        if self.recompute == "full":
            values |= {"recompute_method": "block", "recompute_num_layers": self.recompute_layers}
        return values

    def overrides(self, packs: int, tokens: int) -> list[str]:
        """`key=value` for the trainer, also where a value is the default: a recipe may have set another.

        Args:
            packs: those of a step.
            tokens: of a pack.
        """
        values: dict[str, Any] = {f"model.{key}": value for key, value in self.settings().items()}
        if self.cp == 1:
            del values["model.cp_comm_type"]
        values |= {
            "dist.use_megatron_fsdp": self.fsdp, "train.global_batch_size": packs, "dataset.tokens_per_pack": tokens,
        }  # fmt: skip
        return [f"{key}={json.dumps(value).strip('"')}" for key, value in values.items()]


@dataclass(frozen=True)
class Work:
    """What is trained on which machines."""

    architecture: Architecture
    device: Device
    gpus_per_node: int
    nodes: int
    tokens: int  # of a pack
    samples: int = 1  # in it, of equal length
    packs: int = 1  # of a step, all ranks together

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "nodes", "tokens", "samples", "packs"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is below 1")
        check(
            self.tokens % self.samples == 0,
            f"tokens={self.tokens} do not divide over samples={self.samples}, of equal length; choose another",
        )

    @property
    def ranks(self) -> int:
        return self.gpus_per_node * self.nodes
