"""What a training step makes of a pack, against the samples one by one."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from wan_core.config import IMAGE_LENGTH
from wan_core.data.batch import Pack, TrainingSample
from wan_core.data.synthetic import SyntheticConfig
from wan_core.flow_matching import FlowMatchingConfig, add_noise
from wan_core.parallel import Parallel
from wan_core.patch import patchify, patchify_output
from wan_core.step import prepare, reduce_loss

CPU = torch.device("cpu")


@pytest.fixture
def pack() -> Pack:
    """Seven samples of six shapes."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        TrainingSample(
            __key__=str(i), __restore_key__=(),
            latents=torch.randn(16, 1 + i % 3, 4, 4 + 2 * (i % 2), generator=generator),
            text_embeds=torch.randn(1 + i, 8, generator=generator), seed=i * 2**58 + 7 * i,
        )
        for i in range(7)
    ]  # fmt: skip
    return Pack.of(samples)


def test_equal_shapes_together_are_the_samples_one_by_one(pack: Pack) -> None:
    config = FlowMatchingConfig(density="logit_normal", uniform_share=0.5)
    inputs = prepare(pack, config, Parallel(), CPU)
    noised = [add_noise(config, latents, seed) for latents, seed in zip(pack.latents, pack.seeds, strict=True)]
    assert torch.equal(inputs.patches, torch.cat([patchify(n.noisy_latents) for n in noised]))
    assert torch.equal(inputs.target, torch.cat([patchify_output(n.velocity) for n in noised]))
    assert torch.equal(inputs.timesteps, torch.stack([n.sigma for n in noised]).double() * 1000)
    assert len(set(inputs.timesteps.tolist())) == 7  # each sample has its own


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt"])
def test_the_loss_is_the_mean_over_real_tokens(pack: Pack, weighting: Literal["none", "sigma_sqrt"]) -> None:
    """Of mean squared errors of the samples, each as often as it has tokens; whatever the padding predicts."""
    config = FlowMatchingConfig(weighting=weighting)
    parts = [prepare(pack, config, Parallel(cp=3, cp_rank=rank), CPU) for rank in range(3)]
    assert parts[0].packing.num_tokens > parts[0].packing.num_real_tokens
    predicted = torch.randn(parts[0].packing.num_tokens, 64, generator=torch.Generator().manual_seed(1))
    shares = [reduce_loss(part, share) for part, share in zip(parts, predicted.chunk(3), strict=True)]
    found = sum(loss for loss, _, _ in shares) / sum(count for _, count, _ in shares)
    noised = [add_noise(config, latents, seed) for latents, seed in zip(pack.latents, pack.seeds, strict=True)]
    expected, begin = torch.zeros(()), 0
    for sample in noised:
        target = patchify_output(sample.velocity)
        error = F.mse_loss(predicted[begin : begin + len(target)], target)
        expected += len(target) * error * (sample.sigma.clamp(min=0.2) ** -2 if weighting == "sigma_sqrt" else 1)
        begin += len(target)
    torch.testing.assert_close(found, expected / begin)


def test_a_pack_passes_between_processes_whole(pack: Pack) -> None:
    found = pickle.loads(pickle.dumps(pack))
    for one, other in zip(pack.latents + pack.text_embeds, found.latents + found.text_embeds, strict=True):
        assert torch.equal(one, other)
    assert (found.seeds, found.__key__) == (pack.seeds, pack.__key__)


def test_first_frames_lie_behind_the_noisy_latents() -> None:
    """As diffusers concatenates channels before its patch embedding; the rest is as without them."""
    image = SyntheticConfig(shapes=("3x4x4", "1x4x6", "3x4x4"), text_dim=8, text_length=5, image_dim=6).pack(0)
    image = pickle.loads(pickle.dumps(image))  # as a worker hands it over
    plain = dataclasses.replace(image, first_frames=[])
    config, ranks = FlowMatchingConfig(), Parallel(cp=2, cp_rank=1)
    whole = prepare(plain, config, Parallel(), CPU)
    channels = []
    for frame, latents in zip(image.first_frames, image.latents, strict=True):
        mask = torch.zeros(4, *latents.shape[1:])
        mask[:, 0] = 1
        channels.append(torch.cat([mask, frame.latents]))
    noisy = [
        add_noise(config, latents, seed).noisy_latents for latents, seed in zip(image.latents, image.seeds, strict=True)
    ]
    expected = torch.cat([patchify(torch.cat(pair)) for pair in zip(noisy, channels, strict=True)])  # 36 channels
    found = prepare(image, config, Parallel(), CPU)
    assert torch.equal(found.patches, expected) and torch.equal(found.target, whole.target)
    half = prepare(image, config, ranks, CPU)
    assert torch.equal(half.patches, expected[len(expected) // 2 :])
    for inputs in (found, half):  # every rank attends to the images whole
        assert inputs.image_embeds is not None and inputs.image_embeds.shape == (3 * IMAGE_LENGTH, 6)
        assert torch.equal(inputs.image_embeds, torch.cat([frame.embeds for frame in image.first_frames]))
    assert whole.image_embeds is None and whole.patches.shape[1] == 64
