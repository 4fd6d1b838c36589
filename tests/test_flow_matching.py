"""Noise levels, the path and its velocity, against closed forms and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from wan_core.flow_matching import (
    FlowMatchingConfig,
    add_noise,
    draw_sigmas,
    interpolate,
    loss_weights,
    shift_sigmas,
    sigmas_from_uniform,
    stratified_seed,
    velocity,
)


def stratified(n: int = 200_001) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_is_diffusers_shift(shift: float) -> None:
    sigmas = torch.linspace(1.0, 0.001, 1000, dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    torch.testing.assert_close(shift_sigmas(sigmas, shift).float(), scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_path_is_diffusers_path() -> None:
    latents, noise = torch.randn(2, 16, 3, 4, 4).unbind()
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    timestep = scheduler.timesteps[700:701]
    sigma = scheduler.sigmas[700]
    torch.testing.assert_close(
        interpolate(latents, noise, sigma), scheduler.scale_noise(latents[None], timestep, noise[None])[0]
    )


def test_velocity_is_the_derivative_of_the_path() -> None:
    latents, noise = torch.randn(2, 16, 2, 4, 4, dtype=torch.float64).unbind()
    sigma = torch.tensor(0.3, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda s: interpolate(latents, noise, s), (sigma,), (torch.ones_like(sigma),))
    torch.testing.assert_close(velocity(latents, noise), derivative)


def test_uniform_density() -> None:
    sigmas = sigmas_from_uniform(FlowMatchingConfig(density="uniform", shift=1.0), stratified(), torch.ones(200_001))
    assert abs(sigmas.mean() - 0.5) < 1e-4 and abs(sigmas.var() - 1 / 12) < 1e-4


def test_logit_normal_density() -> None:
    """The logits are normal with the given mean and deviation."""
    config = FlowMatchingConfig(density="logit_normal", logit_mean=0.4, logit_std=1.5, shift=1.0)
    logits = torch.logit(sigmas_from_uniform(config, stratified(), torch.ones(200_001)))
    assert abs(logits.mean() - 0.4) < 1e-3 and abs(logits.std() - 1.5) < 1e-3


def test_mode_density() -> None:
    """Esser et al., equation 20: f(u) = 1 - u - s * (cos^2(pi / 2 * u) - 1 + u)."""
    config = FlowMatchingConfig(density="mode", mode_scale=1.29, shift=1.0)
    u = 0.25
    expected = 1 - u - 1.29 * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
    found = sigmas_from_uniform(config, torch.tensor([u], dtype=torch.float64), torch.ones(1))
    assert abs(found.item() - expected) < 1e-12


def test_mode_density_is_diffusers() -> None:
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(3))
    expected = compute_density_for_timestep_sampling(
        "mode", 64, mode_scale=0.8, generator=torch.Generator().manual_seed(3)
    )
    config = FlowMatchingConfig(density="mode", mode_scale=0.8, shift=1.0)
    torch.testing.assert_close(sigmas_from_uniform(config, uniform.double(), torch.ones(64)).float(), expected)


def test_logit_normal_density_is_diffusers() -> None:
    """By its quantiles, as diffusers draws from the normal distribution directly."""
    drawn = compute_density_for_timestep_sampling(
        "logit_normal", 100_000, logit_mean=0.3, logit_std=1.2, generator=torch.Generator().manual_seed(3)
    )
    config = FlowMatchingConfig(density="logit_normal", logit_mean=0.3, logit_std=1.2, shift=1.0)
    places = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = sigmas_from_uniform(config, places, torch.ones(5)).float()
    torch.testing.assert_close(found, drawn.quantile(places.float()), rtol=0, atol=5e-3)


def test_weighting_is_diffusers() -> None:
    sigmas = torch.tensor([0.2, 0.35, 0.8, 1.0])
    for weighting in ("none", "sigma_sqrt"):
        config = FlowMatchingConfig(weighting=weighting)  # type: ignore[arg-type]
        torch.testing.assert_close(loss_weights(config, sigmas), compute_loss_weighting_for_sd3(weighting, sigmas))
    assert loss_weights(FlowMatchingConfig(weighting="sigma_sqrt"), torch.tensor([0.01])) == pytest.approx(25)


def test_shift_moves_the_median() -> None:
    """Half of the noise levels lie above shift * 0.5 / (1 + (shift - 1) * 0.5)."""
    config = FlowMatchingConfig(density="logit_normal", shift=3.0)
    sigmas = sigmas_from_uniform(config, stratified(), torch.ones(200_001))
    assert abs(sigmas.median() - 0.75) < 1e-4


def test_uniform_share() -> None:
    config = FlowMatchingConfig(density="logit_normal", logit_std=0.01, uniform_share=0.25, shift=1.0)
    uniform = stratified(10_000)
    choice = stratified(10_000)[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]
    sigmas = sigmas_from_uniform(config, uniform, choice)
    assert abs(((sigmas - 0.5).abs() > 0.05).double().mean() - 0.25 * 0.9) < 0.01


@pytest.mark.parametrize("first", [0, 10**9])
def test_stratified_seeds_cover_every_batch_evenly(first: int) -> None:
    """Of n consecutive samples the uniform levels leave no gap above 2 / n; independent draws leave one of log(n) / n.

    So the mean noise level of a batch hardly varies: its deviation over batches is far below 1 / sqrt(12 n).
    """
    config, n = FlowMatchingConfig(shift=1.0), 64
    seeds = torch.randint(2**62, (32 * n,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = draw_sigmas(config, [stratified_seed(s, first + i) for i, s in enumerate(seeds)]).view(32, n)
    gaps = batches.sort(dim=1).values.diff(dim=1)
    assert gaps.max() < 2 / n
    assert batches.mean(1).std() < 0.3 * draw_sigmas(config, seeds).view(32, n).mean(1).std()


def test_stratified_seeds_keep_density_and_noise_apart() -> None:
    """Over the run the levels have the same density, and samples at one level still differ in their noise."""
    config = FlowMatchingConfig(density="logit_normal", logit_std=1.5, shift=1.0)
    logits = torch.logit(draw_sigmas(config, [stratified_seed(i * 7919, i) for i in range(20_000)]))
    assert abs(logits.mean()) < 1e-2 and abs(logits.std() - 1.5) < 1e-2
    one, other = (stratified_seed(seed, 5) for seed in (1, 2))
    assert one != other and draw_sigmas(config, [one]) == draw_sigmas(config, [other])


def test_noise_follows_the_seed_alone() -> None:
    latents, config = torch.randn(16, 2, 4, 4), FlowMatchingConfig()
    first, again, other = (add_noise(config, latents, seed) for seed in (7 * 2**40 + 7, 7 * 2**40 + 7, 8 * 2**40 + 8))
    assert torch.equal(first.noisy_latents, again.noisy_latents) and first.sigma == again.sigma
    assert first.sigma != other.sigma and not torch.equal(first.velocity, other.velocity)
    torch.testing.assert_close(first.noisy_latents, latents + first.sigma * first.velocity)


def test_modes_are_the_documented_presets() -> None:
    pretrain, finetune = FlowMatchingConfig.for_mode("pretrain"), FlowMatchingConfig.for_mode("finetune")
    assert (pretrain.density, pretrain.logit_std, pretrain.shift) == ("logit_normal", 1.5, 2.5)
    assert pretrain.uniform_share > 0
    assert (finetune.density, finetune.logit_std, finetune.shift) == ("uniform", 1.0, 3.0)


@pytest.mark.parametrize("values", [{"shift": 0.0}, {"logit_std": -1.0}, {"caption_dropout": 1.5}])
def test_refuses(values: dict[str, float]) -> None:
    name, value = next(iter(values.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FlowMatchingConfig(**values)
