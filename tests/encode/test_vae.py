from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline

from wan_core.encode.vae import load_vae


def test_latents_equal_those_of_diffusers(tiny_model: Path) -> None:
    vae = load_vae(tiny_model, torch.float32, "cpu")
    pipe = WanVideoToVideoPipeline.from_pretrained(tiny_model)
    video = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    ones = torch.ones(1)

    class Zero:  # adds no noise: what is left of prepare_latents is its encoding
        def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return latents

    pipe.scheduler = Zero()
    expected = pipe.prepare_latents(video, batch_size=2, height=32, width=48, dtype=torch.float32, timestep=ones)
    found = vae.encode(video)
    assert found.shape == (2, 16, 3, 4, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_decoded_video_equals_that_of_diffusers(tiny_model: Path) -> None:
    pipe = WanPipeline.from_pretrained(tiny_model)
    settings = dict(prompt="a red circle", height=32, width=48, num_frames=9, num_inference_steps=2)
    latents = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    expected = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").frames  # [0, 1], BTCHW
    found = load_vae(tiny_model, torch.float32, "cpu").decode(latents)
    assert found.shape == (1, 3, 9, 32, 48) and found.dtype == torch.float32
    torch.testing.assert_close((found / 2 + 0.5).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_normalised_in_float32(tiny_model: Path) -> None:
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    vae = load_vae(tiny_model, torch.bfloat16, "cpu")
    mean = vae.model.encode(video.bfloat16()).latent_dist.mean.double()
    center, scale = (torch.tensor(vae.model.config[f"latents_{name}"]).view(16, 1, 1, 1) for name in ("mean", "std"))
    expected = (mean - center) / scale
    torch.testing.assert_close(vae.encode(video).double(), expected, rtol=1e-6, atol=1e-6)


def test_length_that_loses_frames_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="8 frames, which is not 4n"):
        load_vae(tiny_model, torch.float32, "cpu").encode(torch.zeros(1, 3, 8, 32, 32))
