"""Encoding on a GPU against a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from wan_core.encode.image import load_image_encoder
from wan_core.encode.vae import Shape, Vae, load_vae
from wan_core.first_frame import FirstFrame


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16x3"])
def test_first_frames_on_a_gpu(tiny_i2v_model: Path, precision: str) -> None:
    """As on a CPU: TF32 is off, and the arrangement for GPUs takes floats as it takes bytes."""
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    found, expected = (
        FirstFrame(
            load_vae(tiny_i2v_model, kind, device).encode_first_frame(torch.tensor(image), 17),
            load_image_encoder(tiny_i2v_model, device).encode(image),
        )
        for kind, device in ((precision, "cuda"), ("float32", "cpu"))
    )
    torch.testing.assert_close(found.embeds.cpu(), expected.embeds, rtol=1e-4, atol=1e-4)
    assert float((found.latents.cpu() - expected.latents).norm() / expected.latents.norm()) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "error"), [("float16", 2e-5), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("shape", [(1, 96, 128), (9, 64, 96)])
def test_a_batch_gives_what_each_clip_by_itself_does(shape: Shape, precision: str, error: float) -> None:
    torch.manual_seed(0)
    vae = Vae(AutoencoderKLWan(base_dim=96, num_res_blocks=1).cuda(), precision)
    clips = torch.randint(0, 256, (vae.batch_size(shape), *shape, 3), dtype=torch.uint8)
    assert len(clips) > 1
    alone = torch.cat([vae.encode(vae.stacked([clip])) for clip in clips])
    assert float((vae.encode(vae.stacked(list(clips))) - alone).norm() / alone.norm()) <= error
