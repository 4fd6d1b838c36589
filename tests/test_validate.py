"""The validation loss against diffusers' own transformer, clip by clip."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.resume.data import make_dataset
from tests.tiny import IMAGE_DIM, TEXT_DIM
from wan_core import validate
from wan_core.config import TEXT_LENGTH
from wan_core.digests import encoder_identity


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("index"), 12, text_dim=TEXT_DIM)


def num_held_out(dataset: Path) -> int:
    """Samples in the `val` shards, which are few but some."""
    keys = set()
    for path in dataset.glob("val-*.tar"):
        with tarfile.open(path) as tar:
            keys |= {name.partition(".")[0] for name in tar.getnames()}
    count = len(keys)
    assert 0 < count < 12
    return count


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
    count = num_held_out(dataset)
    assert found.num_clips == count and len(losses) == 5 * count
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.losses[0] == pytest.approx(sum(losses[::5]) / count, rel=1e-5)
    assert validate.run(tiny_model, dataset, device="cpu") == found


def test_loss_of_image_to_video_is_that_of_diffusers(tiny_i2v_model: Path, dataset: Path, tmp_path: Path) -> None:
    framed = make_dataset(
        tmp_path, 12, text_dim=TEXT_DIM, image_dim=IMAGE_DIM, encoder=encoder_identity(tiny_i2v_model)
    )  # fmt: skip
    found = validate.run(tiny_i2v_model, framed, device="cpu")
    reference = WanTransformer3DModel.from_pretrained(tiny_i2v_model / "transformer").eval()
    losses = []
    with torch.no_grad():
        for key, latents, text, frame in validate.held_out(framed):
            assert frame is not None
            noise = validate.noise_for(key, latents)
            padded = torch.nn.functional.pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))
            noisy = torch.cat([(1 - found.sigmas[2]) * latents + found.sigmas[2] * noise, frame.channels()])
            timestep = torch.tensor([1000 * found.sigmas[2]])
            predicted = reference(noisy[None], timestep, padded[None], frame.embeds[None]).sample[0]
            losses.append((predicted - (noise - latents)).square().mean().item())
    assert found.losses[2] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len(losses) == num_held_out(framed)
    with pytest.raises(ValueError, match="was encoded for text-to-video"):
        validate.run(tiny_i2v_model, dataset, device="cpu")


def test_a_dataset_without_validation_split_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no val samples; add clips"):
        validate.run(tiny_model, make_dataset(tmp_path, 2, 0.0), device="cpu")
