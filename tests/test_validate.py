"""The validation loss against diffusers' own transformer, clip by clip."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.tiny import IMAGE_DIM, TEXT_DIM
from wan_core import validate
from wan_core.config import IMAGE_LENGTH, TEXT_LENGTH
from wan_core.data.samples import ClipInfo, Sample, write_sample
from wan_core.first_frame import FirstFrame

INFO = ClipInfo("a red circle", "0" * 64, 0, None, 5, 16.0, 32, 48, "video", True, False, "float32", "float32", {})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("index"))


def make_dataset(folder: Path, image_dim: int = 0) -> Path:
    """Three held-out clips of two shapes, and one of the training split, which must not count."""
    generator = torch.Generator().manual_seed(0)
    for name, shapes in (("val-000", ((2, 4, 6), (1, 6, 4), (2, 4, 6))), ("train-000", ((2, 4, 4),))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, shape in enumerate(shapes):
                latents = torch.randn(16, *shape, generator=generator)
                text = torch.randn(3 + i, TEXT_DIM, generator=generator)
                frame = None
                if image_dim:
                    embeds = torch.randn(IMAGE_LENGTH, image_dim, generator=generator)
                    frame = FirstFrame(torch.randn(16, *shape, generator=generator), embeds)
                write_sample(tar, Sample(f"{name}-{i}", latents, text, INFO, frame))
    return folder


def test_loss_is_that_of_diffusers(tiny_model: Path, dataset: Path) -> None:
    found = validate.run(tiny_model, dataset, device="cpu")
    reference = WanTransformer3DModel.from_pretrained(tiny_model / "transformer").eval()
    losses = []
    with torch.no_grad():
        for key, latents, text, _ in validate.held_out(dataset):
            noise = validate.noise_for(key, latents)
            padded = torch.nn.functional.pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))
            for sigma in found.sigmas:
                noisy = (1 - sigma) * latents + sigma * noise
                predicted = reference(noisy[None], torch.tensor([1000 * sigma]), padded[None]).sample[0]
                losses.append((predicted - (noise - latents)).square().mean().item())
    assert found.num_clips == 3 and len(losses) == 15
    assert found.loss == pytest.approx(sum(losses) / 15, rel=1e-5)
    assert found.losses[0] == pytest.approx(sum(losses[::5]) / 3, rel=1e-5)
    assert validate.run(tiny_model, dataset, device="cpu") == found


def test_loss_of_image_to_video_is_that_of_diffusers(tiny_i2v_model: Path, dataset: Path, tmp_path: Path) -> None:
    found = validate.run(tiny_i2v_model, make_dataset(tmp_path, IMAGE_DIM), device="cpu")
    reference = WanTransformer3DModel.from_pretrained(tiny_i2v_model / "transformer").eval()
    losses = []
    with torch.no_grad():
        for key, latents, text, frame in validate.held_out(tmp_path):
            assert frame is not None
            noise = validate.noise_for(key, latents)
            padded = torch.nn.functional.pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))
            noisy = torch.cat([(1 - found.sigmas[2]) * latents + found.sigmas[2] * noise, frame.channels()])
            timestep = torch.tensor([1000 * found.sigmas[2]])
            predicted = reference(noisy[None], timestep, padded[None], frame.embeds[None]).sample[0]
            losses.append((predicted - (noise - latents)).square().mean().item())
    assert found.losses[2] == pytest.approx(sum(losses) / 3, rel=1e-5) and len(losses) == 3
    with pytest.raises(ValueError, match="was encoded for text-to-video"):
        validate.run(tiny_i2v_model, dataset, device="cpu")


def test_a_dataset_without_validation_split_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no val split"):
        validate.run(tiny_model, tmp_path, device="cpu")
