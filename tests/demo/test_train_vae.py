"""The committed VAE on clips that it never saw, and the program that trains it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wan_core.demo.checker import check_clip
from wan_core.demo.train_vae import WEIGHTS, load_vae, main, psnr, reconstruct, set_statistics, to_model
from wan_core.demo.videos import FPS, random_scene, render
from wan_core.encode.video import load_video, write_video


@pytest.fixture(scope="module")
def vae():
    return load_vae()


def test_its_file_is_small_and_its_strides_are_wan_2_1s(vae):
    assert WEIGHTS.stat().st_size <= 4_000_000
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 9, 64, 96)).latent_dist.mean
    assert latents.shape == (1, 16, 3, 8, 12)


def test_it_reconstructs_held_out_clips_after_h264(vae, tmp_path: Path):
    rng, ratios, right = np.random.default_rng(2024), [], []
    for _ in range(12):
        scene = random_scene(rng)
        write_video(tmp_path / "clip.mp4", render(scene), FPS)
        clip, _ = load_video(tmp_path / "clip.mp4")
        decoded = reconstruct(vae, clip)
        ratios.append(psnr(clip, decoded))
        seen = check_clip(decoded)
        right.append((seen.colour, seen.shape, seen.direction) == (scene.colour, scene.shape, scene.direction))
    assert np.mean(ratios) >= 25
    assert np.mean(right) >= 0.9


def test_its_statistics_normalise_demo_latents(vae):
    rng = np.random.default_rng(7)
    with torch.no_grad():
        clips = [
            vae.encode(to_model(render(random_scene(rng))[None])).latent_dist.mean[0].flatten(1) for _ in range(16)
        ]
    latents = torch.cat(clips, dim=1)
    normalised = (latents - torch.tensor(vae.config.latents_mean)[:, None]) / torch.tensor(vae.config.latents_std)[
        :, None
    ]
    assert normalised.mean(1).abs().max() < 0.3
    assert normalised.std(1).max() < 1.5 and normalised.std(1).min() > 0.6


def test_psnr_is_that_of_its_definition():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_statistics_are_those_of_the_latents():
    vae = load_vae()
    scenes = [random_scene(np.random.default_rng(seed), size=(64, 64), num_frames=9) for seed in range(3)]
    set_statistics(vae, scenes)
    with torch.no_grad():
        clips = to_model(np.stack([render(scene) for scene in scenes]))
        latents = vae.encode(clips).latent_dist.mean.transpose(0, 1).flatten(1)
    assert vae.config.latents_mean == pytest.approx(latents.mean(1).tolist(), abs=2e-4)
    assert vae.config.latents_std == pytest.approx(latents.std(1).tolist(), abs=2e-4)


@pytest.mark.slow
def test_training_runs_and_writes_what_load_reads(tmp_path: Path):
    main(["--output", str(tmp_path), "--minutes", "0.05", "--batch", "2", "--device", "cpu", "--statistics-clips", "4"])
    trained = load_vae(tmp_path)
    assert json.loads((tmp_path / "vae.json").read_text())["latents_std"] == trained.config.latents_std
    assert all(torch.isfinite(parameter).all() for parameter in trained.parameters())
