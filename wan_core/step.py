"""One forward step: a pack is noised, the model predicts its velocity, the loss is a sum over real tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from wan_core.config import TEXT_LENGTH
from wan_core.data.batch import Pack
from wan_core.first_frame import behind, pack_first_frames
from wan_core.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    FlowMatchingConfig,
    draw_noise,
    draw_sigmas,
    interpolate,
    loss_weights,
    velocity,
)
from wan_core.packing import Packing, pack_text
from wan_core.parallel import Parallel
from wan_core.patch import GridSize, patchify, patchify_output


@dataclass(frozen=True)
class StepInputs:
    """One context-parallel rank's share of a noised pack."""

    patches: Tensor  # [local tokens, 4 * in_channels] float32
    target: Tensor  # [local tokens, 4 * C] float32, the velocity in the head's feature order
    timesteps: Tensor  # [samples] float64: megatron's bf16 wrapper casts float32 arguments, and would round these
    text_embeds: Tensor  # [text rows, text_dim], see packing.pack_text
    image_embeds: Tensor | None  # [257 * samples, image_dim] for image-to-video
    loss_mask: Tensor  # [local tokens] float32
    token_weights: Tensor  # [local tokens] float32
    packing: Packing  # this rank's share


def prepare(pack: Pack, config: FlowMatchingConfig, parallel: Parallel, device: torch.device) -> StepInputs:
    """Noise a pack and cut this context-parallel rank's tokens out of it.

    Every rank draws the whole pack's noise, each sample's from its own seed: that costs less than sending it.
    """
    drawn = draw_sigmas(config, pack.seeds) if pack.sigmas is None else torch.tensor(pack.sigmas)
    sigmas = drawn.to(device, non_blocking=True)
    grids = [GridSize.of(sample) for sample in pack.latents]
    whole = Packing.of(grids, pack.text_embeds, parallel.sequence_ranks)
    packing = whole.part(parallel.cp_rank, parallel.cp)
    padding = (0, 0, 0, whole.num_tokens - whole.num_real_tokens)
    noisy, target = _noised(pack, sigmas, device)
    given, image_embeds = pack_first_frames([frame.to(device) for frame in pack.first_frames])
    patches, target = (F.pad(tokens, padding) for tokens in (behind(noisy, given), target))
    return StepInputs(
        patches=patches[packing.start : packing.stop], target=target[packing.start : packing.stop],
        timesteps=sigmas.double() * NUM_TRAIN_TIMESTEPS,
        text_embeds=pack_text(pack.text_embeds).to(device, non_blocking=True),
        image_embeds=image_embeds,
        loss_mask=packing.loss_mask(device) * pack.counts,
        token_weights=loss_weights(config, sigmas)[packing.sample_index(device)], packing=packing,
    )  # fmt: skip


def _noised(pack: Pack, sigmas: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noisy patches and target velocities of a pack's samples in order, [tokens, 4 * C] float32 each.

    Samples of equal shape are worked on together: a pack may hold hundreds of small ones, and each operation is a
    launch.
    """
    shapes = [sample.shape for sample in pack.latents]
    latents = torch.cat([sample.flatten() for sample in pack.latents]).to(device, non_blocking=True).float()
    samples = [part.view(shape) for part, shape in zip(latents.split([s.numel() for s in shapes]), shapes, strict=True)]
    noise = draw_noise(shapes, pack.seeds, device)
    tokens: dict[int, tuple[Tensor, Tensor]] = {}
    for shape in dict.fromkeys(shapes):
        alike = [index for index, other in enumerate(shapes) if other == shape]
        clean, drawn = (torch.stack([tensors[index] for index in alike]) for tensors in (samples, noise))
        sigma = sigmas[torch.tensor(alike).to(device, non_blocking=True)].view(-1, 1, 1, 1, 1)
        patches = patchify(interpolate(clean, drawn, sigma)), patchify_output(velocity(clean, drawn))
        tokens |= zip(alike, zip(*patches, strict=True), strict=True)
    noisy, target = zip(*(tokens[index] for index in range(len(shapes))), strict=True)
    return torch.cat(noisy), torch.cat(target)


def token_losses(inputs: StepInputs, predicted: Tensor) -> Tensor:
    """Squared error per token, averaged over its features, 0 for padding: [local tokens] float32."""
    errors = (predicted.float() - inputs.target).square().mean(-1)
    return errors * inputs.token_weights * inputs.loss_mask


def reduce_loss(inputs: StepInputs, predicted: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss triple: sum, number of real tokens, and what is averaged over the global batch for the log."""
    loss, num_tokens = token_losses(inputs, predicted).sum(), inputs.loss_mask.sum()
    return loss, num_tokens.int(), {"loss": torch.stack((loss.detach(), num_tokens))}


def reduce_validation_loss(
    sigmas: Sequence[float], inputs: StepInputs, predicted: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same for validation: also the mean per noise level, none of them weighted."""
    inputs = replace(inputs, token_weights=torch.ones_like(inputs.token_weights))
    errors, device = token_losses(inputs, predicted), predicted.device
    pair = torch.stack((errors, inputs.loss_mask), dim=-1)  # [local tokens, 2]
    token_sigmas = (inputs.timesteps / NUM_TRAIN_TIMESTEPS).float()[inputs.packing.sample_index(device)]
    levels = {level_name(s): pair[(token_sigmas - s).abs() < 1e-6].sum(0) for s in sigmas}
    total = pair.sum(0)
    return total[0], total[1].int(), {"loss": total, **levels}


def level_name(sigma: float) -> str:
    """Name of a noise level's loss in the logs."""
    return f"loss at sigma {sigma:g}"


def count_flops(state: Any, packing: Packing, counts: bool) -> None:
    """Add a pack to what Bridge's throughput log counts: tokens, squared lengths, text positions."""
    state._flops_requires_global_reduce = True  # on every rank, also on one whose packs do not count
    if not counts:
        return
    state._flops_seqlen_sum += packing.num_real_tokens
    state._flops_seqlen_sq_sum += sum(length**2 for length in packing.lengths)
    state._flops_cross_seqlen_sum += TEXT_LENGTH * packing.num_samples


class WanStep:
    """The `forward_step_func` of Bridge's `pretrain`."""

    def __init__(self, flow_matching: FlowMatchingConfig, validation_sigmas: Sequence[float] = ()) -> None:
        self.flow_matching, self.validation_sigmas = flow_matching, validation_sigmas
        self.data_seconds = 0.0  # spent waiting for packs, until somebody resets it, as the next
        self.num_packs = 0  # that this rank has trained on
        self.begin()

    def begin(self) -> None:
        """Forget the packs of the step before."""
        self.keys: list[str] = []  # of the samples that this rank has taken
        self._losses: list[Tensor] = []  # [sum, tokens] of each pack, on the last pipeline stage

    def __call__(self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        """Returns the model's output and the function that turns it into the loss."""
        assert not return_schedule_plan, "overlapped MoE schedules have no meaning here"
        begin = time.perf_counter()
        pack = next(data_iterator)
        self.data_seconds += time.perf_counter() - begin
        inputs, predicted = forward(pack, model, self.flow_matching)
        if not model.training:
            return predicted, partial(reduce_validation_loss, self.validation_sigmas, inputs)
        self.num_packs += 1
        self.keys += pack.keys if pack.counts else []
        count_flops(state, inputs.packing, pack.counts)
        return predicted, partial(self._reduce_loss, inputs)

    def schedule(self, dataset: Any, **sizes: Any) -> Callable[..., Any]:
        """Megatron's schedule. Where steps count samples or tokens, how many packs one has is known when it comes.

        Bridge goes on counting `train.global_batch_size` a step, so learning rate and consumed samples are right.
        """
        run = get_forward_backward_func(**sizes)
        if dataset.batch_unit == "packs":
            return run

        def run_step(*, num_microbatches: int, **arguments: Any) -> Any:
            begin = time.perf_counter()
            num_packs = dataset.loader.packs_in_step()
            self.data_seconds += time.perf_counter() - begin
            return run(num_microbatches=num_packs, **arguments)

        return run_step

    def _reduce_loss(self, inputs: StepInputs, predicted: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result = reduce_loss(inputs, predicted)
        self._losses.append(result[2]["loss"])
        return result

    def global_loss(self) -> float:
        """This step's loss over all ranks, the same on each. (Ranks that hold copies count alike, in both sums.)"""
        total = torch.zeros(2, device="cuda")
        for pair in self._losses:
            total += pair
        dist.all_reduce(total)
        loss_sum, num_tokens = total.tolist()
        return loss_sum / num_tokens


def forward(pack: Pack, model: Any, config: FlowMatchingConfig) -> tuple[StepInputs, Tensor]:
    """Noise a pack and run the (wrapped) model on it."""
    parameter = next(model.parameters())
    parallel = Parallel.current(get_model_config(model).sequence_parallel)
    inputs = prepare(pack, config, parallel, parameter.device)
    return inputs, model(inputs.patches, inputs.timesteps, inputs.text_embeds, inputs.packing, inputs.image_embeds)
