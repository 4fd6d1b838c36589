"""An exponential moving average of the weights, float32, sharded as the optimizer's moments are.

The average is one more entry of the optimizer's state, beside Adam's moments: it lies where they lie, and a checkpoint
holds it as `optimizer.state.ema.<parameter>`, whole and in any layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import OptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor
from torch.distributed.tensor import DTensor

from wan_core.config import check

KEY = "ema"
NO_DECAY = ParamGroupOverride(wd_mult=0.0)


@dataclass
class WanOptimizerConfig(OptimizerConfig):
    """Bridge's section, with the average."""

    ema_decay: float = 0.0  # of the average of the weights, per step; 0: none is kept

    def finalize(self) -> None:
        """Raises `ValueError` for an average that cannot be kept."""
        check(0 <= self.ema_decay < 1, f"optimizer.ema_decay={self.ema_decay} is not in [0, 1); choose 0.9999, or 0")
        super().finalize()
        if self.ema_decay:
            check(
                self.use_distributed_optimizer and not self.use_precision_aware_optimizer,
                f"optimizer.ema_decay={self.ema_decay} needs use_distributed_optimizer=true and "
                "use_precision_aware_optimizer=false, as it is kept beside float32 weights; set them, or ema_decay=0",
            )

    def provide(self, **arguments: Any) -> Any:
        """The optimizer; Bridge asks for it here. Norms and biases are not decayed, and modulation is not, either."""
        overrides = {**(arguments.pop("config_overrides") or {}), ParamKey(name="*modulation"): NO_DECAY}
        optimizer = get_megatron_optimizer(config=self, config_overrides=overrides, **arguments)
        for part in parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                part.__class__ = AveragingOptimizer if self.ema_decay else ReshardableOptimizer
        if not torch.cuda.is_available():  # torch's AdamW, which else makes a dozen passes over each small tensor
            for group in (group for part in parts(optimizer) for group in part.optimizer.param_groups):
                group["fused"] = not any(isinstance(weight, DTensor) for weight in group["params"])
        if self.ema_decay:
            for part in parts(optimizer):
                if hasattr(part.optimizer, "name_to_dtype_map"):  # Transformer Engine's asks it for every entry
                    part.optimizer.name_to_dtype_map[KEY] = torch.float32
        return optimizer


class ReshardableOptimizer(DistributedOptimizer):
    """A distributed optimizer whose checkpoints are right with several gradient buckets, too."""

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Weights and moments of all ranks, flat, each bucket at its offset in the buffer.

        megatron-core (0.19.2) leaves out the padding between buckets, but then cuts parameters out at offsets that
        count it: from the second bucket on, a checkpoint held a neighbour's numbers under a parameter's name.
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        for number, buffer in enumerate(self.buffers if state else ()):
            sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
            for tensors in state[number].values():
                for key, packed in tensors.items():
                    if isinstance(packed, Tensor):
                        tensors[key] = padded = packed.new_zeros(buffer.numel)
                        for bucket, part in zip(buffer.buckets, packed.split(sizes), strict=True):
                            padded[bucket.offset : bucket.offset + len(part)] = part
        return state


class AveragingOptimizer(ReshardableOptimizer):
    """A distributed optimizer whose checkpoints hold the average, too."""

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return (*super().optimizer_state_keys, KEY)

    def _init_optimizer_states_with_dummy_values(self) -> None:
        """Room for what a checkpoint holds."""
        super()._init_optimizer_states_with_dummy_values()
        for state in self.optimizer.state.values():
            state.setdefault(KEY, torch.zeros_like(state["exp_avg"]))


def parts(optimizer: Any) -> list[DistributedOptimizer]:
    """The optimizers behind megatron's chain of them; one that has no parameters is none."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not getattr(part, "is_stub_optimizer", False)]


def averages(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """This rank's shards: float32 weights and their averages, which begin as copies."""
    pairs = []
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                state = part.optimizer.state.get(weight)
                if state:  # a rank may have an empty shard
                    pairs.append((weight.detach(), state.setdefault(KEY, weight.detach().clone())))
    return pairs


def decay_at(decay: float, step: int) -> float:
    """The decay of a step, counted from 0: early averages forget the beginning, min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(optimizer: Any, decay: float) -> None:
    """average = decay * average + (1 - decay) * weight, over all shards at once."""
    pairs = averages(optimizer)
    if pairs:
        weights, means = zip(*pairs, strict=True)
        torch._foreach_lerp_(means, weights, 1 - decay)


class AverageWeights(Callback):
    """Updates the average after every step that was taken."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_step_end(self, context: CallbackContext) -> None:
        if not context.skipped_iter:
            update(context.optimizer, decay_at(self.decay, context.state.train_state.step))


@contextlib.contextmanager
def averaged(model: list[Any], optimizer: Any) -> Iterator[None]:
    """The model with its averages as weights; on leaving, the weights are what they were, to the bit."""
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


@torch.no_grad()
def _exchange(model: list[Any], optimizer: Any) -> None:
    for weight, mean in averages(optimizer):
        kept = weight.clone()
        weight.copy_(mean)
        mean.copy_(kept)
    for part in parts(optimizer):
        part._copy_main_params_to_model_params()
    for chunk in model:
        if chunk.ddp_config.use_megatron_fsdp:
            chunk.synchronize_param_gather()  # drops what it has gathered in advance
            chunk.start_param_sync()
        else:
            chunk.start_param_sync(force_sync=True)
