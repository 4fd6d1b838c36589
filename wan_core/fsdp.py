"""Megatron-FSDP: weights, gradients and optimizer state in shards, gathered one transformer block at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection
from typing import Any

import megatron.core.distributed.fsdp.mcore_fsdp_adapter as adapter
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from wan_core.config import check
from wan_core.layout import check_fsdp
from wan_core.model.layer import WanLayer

NEEDED: dict[str, Any] = {  # what `dist.use_megatron_fsdp=true` stands for
    "dist.use_megatron_fsdp": True,
    "ddp.use_megatron_fsdp": True,
    "ddp.use_distributed_optimizer": True,
    "optimizer.use_distributed_optimizer": True,
    "ddp.data_parallel_sharding_strategy": "optim_grads_params",
    "ddp.megatron_fsdp_main_grads_dtype": torch.float32,  # else gradients are summed in bfloat16
    "checkpoint.ckpt_format": "fsdp_dtensor",  # the only one that it writes
}


def configure(container: Any, given: Collection[str]) -> None:
    """Complete a config that asks for Megatron-FSDP; others stay as they are.

    Args:
        given: keys that a recipe or the user has set, `section.field`.

    Raises:
        ValueError: one of them does not go with Megatron-FSDP.
    """
    if not (container.dist.use_megatron_fsdp or container.ddp.use_megatron_fsdp):
        return
    for key, value in NEEDED.items():
        section, _, name = key.partition(".")
        owner = getattr(container, section)
        found = getattr(owner, name)
        check(
            found == value or key not in given,
            f"{key}={found} does not go with Megatron-FSDP, which needs {value}; leave it out, or set "
            "dist.use_megatron_fsdp=false",
        )
        setattr(owner, name, value)
    check_fsdp(container.model)
    check(
        os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1",
        "CUDA_DEVICE_MAX_CONNECTIONS=1 keeps Megatron-FSDP from gathering weights beside computation; unset it",
    )


def prepare() -> None:
    """Adapt megatron to our model, before it is wrapped. Doing it again changes nothing."""
    # The wrapper takes its units as an argument, but Bridge leaves it at the default, megatron's own layer.
    adapter.TransformerLayer = WanLayer
    if DistributedOptimizer.sharded_param_state_fsdp_dtensor is not _sharded_state:
        DistributedOptimizer.load_state_dict = _without_empty_shards(DistributedOptimizer.load_state_dict)
        DistributedOptimizer.sharded_param_state_fsdp_dtensor = _sharded_state


_megatron_sharded_state = DistributedOptimizer.sharded_param_state_fsdp_dtensor


def _sharded_state(self: Any, is_loading: bool = False) -> dict[str, Any]:
    """The optimizer's state for a checkpoint, with the moments of every parameter on every rank.

    Adam keeps none for a shard without elements, but to save, the ranks of a parameter ask each other where their
    parts begin: one without an answer would leave the others waiting.
    """
    result = _megatron_sharded_state(self, is_loading)
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            state = result["state"].setdefault(self._param_name(parameter), {})
            for moment in self.optimizer_state_keys:
                state.setdefault(moment, torch.zeros_like(parameter))
    return result


def _without_empty_shards(load: Callable[..., None]) -> Callable[..., None]:
    """Leave out what `_sharded_state` added."""

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        if self.ddp_config.use_megatron_fsdp:
            state = state_dict["state"]
            state_dict["state"] = {name: each for name, each in state.items() if each["exp_avg"].to_local().numel()}
        load(self, state_dict)

    return load_state_dict
