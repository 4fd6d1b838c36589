from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline

from wan_core.encode.vae import load_vae


def test_latents_equal_those_of_diffusers(tiny_model: Path) -> None:
    vae = load_vae(tiny_model, "float32", "cpu")
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
    found = load_vae(tiny_model, "float32", "cpu").decode(latents)
    assert found.shape == (1, 3, 9, 32, 48) and found.dtype == torch.float32
    torch.testing.assert_close((found / 2 + 0.5).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_uint8_is_read_as_the_floats_it_stands_for(tiny_model: Path) -> None:
    vae = load_vae(tiny_model, "float32", "cpu")
    video = torch.randint(0, 256, (1, 3, 5, 32, 32), dtype=torch.uint8)
    assert torch.equal(vae.encode(video), vae.encode(video.float() / 127.5 - 1))


def test_length_that_loses_frames_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="8 frames, which is not 4n"):
        load_vae(tiny_model, "float32", "cpu").encode(torch.zeros(1, 3, 8, 32, 32))
