"""What a training step makes of a pack, against the samples one by one."""

from __future__ import annotations

import pickle

import pytest
import torch

from wan_core.data.batch import Pack, TrainingSample
from wan_core.flow_matching import FlowMatchingConfig, add_noise
from wan_core.parallel import Parallel
from wan_core.patch import patchify, patchify_output
from wan_core.step import prepare

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


def test_a_pack_passes_between_processes_whole(pack: Pack) -> None:
    found = pickle.loads(pickle.dumps(pack))
    for one, other in zip(pack.latents + pack.text_embeds, found.latents + found.text_embeds, strict=True):
        assert torch.equal(one, other)
    assert (found.seeds, found.__key__) == (pack.seeds, pack.__key__)
