"""One forward step: a pack is noised, the model predicts its velocity, the loss is a sum over real tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.utils import get_model_config
from torch import Tensor

from wan_core.config import TEXT_LENGTH
from wan_core.data.batch import Pack
from wan_core.flow_matching import NUM_TRAIN_TIMESTEPS, FlowMatchingConfig, add_noise, loss_weights
from wan_core.packing import Packing, pack_text
from wan_core.parallel import Parallel
from wan_core.patch import GridSize, patchify, patchify_output


@dataclass(frozen=True)
class StepInputs:
    """One context-parallel rank's share of a noised pack."""

    patches: Tensor  # [local tokens, 4 * C] float32
    target: Tensor  # [local tokens, 4 * C] float32, the velocity in the head's feature order
    timesteps: Tensor  # [samples] float64: megatron's bf16 wrapper casts float32 arguments, and would round these
    text_embeds: Tensor  # [text rows, text_dim], see packing.pack_text
    loss_mask: Tensor  # [local tokens] float32
    token_weights: Tensor  # [local tokens] float32
    packing: Packing  # this rank's share


def prepare(pack: Pack, config: FlowMatchingConfig, parallel: Parallel, device: torch.device) -> StepInputs:
    """Noise a pack and cut this context-parallel rank's tokens out of it.

    Every rank draws the whole pack's noise, each sample's from its own seed: that costs less than sending it.
    """
    latents = [sample.to(device, non_blocking=True) for sample in pack.latents]
    noised = [add_noise(config, sample, seed) for sample, seed in zip(latents, pack.seeds, strict=True)]
    whole = Packing.of([GridSize.of(sample) for sample in latents], pack.text_embeds, parallel.sequence_ranks)
    packing = whole.part(parallel.cp_rank, parallel.cp)
    padding = (0, 0, 0, whole.num_tokens - whole.num_real_tokens)
    patches = F.pad(torch.cat([patchify(n.noisy_latents) for n in noised]), padding)
    target = F.pad(torch.cat([patchify_output(n.velocity) for n in noised]), padding)
    sigmas = torch.stack([n.sigma for n in noised])
    return StepInputs(
        patches=patches[packing.start : packing.stop], target=target[packing.start : packing.stop],
        timesteps=sigmas.double() * NUM_TRAIN_TIMESTEPS,
        text_embeds=pack_text(pack.text_embeds).to(device, non_blocking=True),
        loss_mask=packing.loss_mask(device),
        token_weights=loss_weights(config, sigmas)[packing.sample_index(device)], packing=packing,
    )  # fmt: skip


def token_losses(inputs: StepInputs, velocity: Tensor) -> Tensor:
    """Squared error per token, averaged over its features, 0 for padding: [local tokens] float32."""
    errors = (velocity.float() - inputs.target).square().mean(-1)
    return errors * inputs.token_weights * inputs.loss_mask


def reduce_loss(inputs: StepInputs, velocity: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss triple: sum, number of real tokens, and what is averaged over the global batch for the log.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    loss = token_losses(inputs, velocity).sum()
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()} in a pack of grids {inputs.packing.grids} at timesteps "
            f"{[round(t, 1) for t in inputs.timesteps.tolist()]}; lower optimizer.lr or clip_grad, or look at the data"
        )
    num_tokens = inputs.loss_mask.sum().int()
    return loss, num_tokens, {"loss": torch.stack((loss.detach(), num_tokens.float()))}


def count_flops(state: Any, packing: Packing) -> None:
    """Add a pack to what Bridge's throughput log counts: tokens, squared lengths, text positions."""
    state._flops_seqlen_sum += packing.num_real_tokens
    state._flops_seqlen_sq_sum += sum(length**2 for length in packing.lengths)
    state._flops_cross_seqlen_sum += TEXT_LENGTH * packing.num_samples
    state._flops_requires_global_reduce = True


class WanStep:
    """The `forward_step_func` of Bridge's `pretrain`."""

    def __init__(self, flow_matching: FlowMatchingConfig) -> None:
        self.flow_matching = flow_matching

    def __call__(self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        """Returns the model's output and the function that turns it into the loss."""
        assert not return_schedule_plan, "overlapped MoE schedules have no meaning here"
        inputs, velocity = forward(next(data_iterator), model, self.flow_matching)
        if model.training:
            count_flops(state, inputs.packing)
        return velocity, partial(reduce_loss, inputs)


def forward(pack: Pack, model: Any, config: FlowMatchingConfig) -> tuple[StepInputs, Tensor]:
    """Noise a pack and run the (wrapped) model on it."""
    parameter = next(model.parameters())
    parallel = Parallel.current(get_model_config(model).sequence_parallel)
    inputs = prepare(pack, config, parallel, parameter.device)
    return inputs, model(inputs.patches, inputs.timesteps, inputs.text_embeds, inputs.packing)
