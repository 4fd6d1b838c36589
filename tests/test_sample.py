"""The sampler against diffusers' own pipelines, from the same noise, with UniPC and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from wan_core import sample
from wan_core.config import SampleConfig, Size
from wan_core.inference import loaded_transformer

CPU = torch.device("cpu")
CONFIG = SampleConfig(
    prompts=("a red circle moves left", "a blue square"), negative_prompt="a", size=Size(32, 48), num_frames=5,
    num_steps=3, guidance_scale=4.0, shift=3.0, seed=7, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two of the video's size: diffusers stretches others to it, where we cut."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    names = [str(folder / f"{number}.png") for number in range(2)]
    for name in names:
        Image.fromarray(random.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(name)
    return tuple(names)


def ours(config: SampleConfig, model: Path) -> list[torch.Tensor]:
    conditions = sample.encode_conditions(config, model, CPU)
    noise = torch.stack([sample.initial_noise((16, 2, 4, 6), config.seed + i) for i in range(len(conditions))])
    with loaded_transformer(model, None, torch.float32, CPU) as transformer:
        return list(sample.denoise(config, transformer, noise, conditions, model))


def theirs(config: SampleConfig, pipeline: WanPipeline, images: Sequence[str]) -> list[torch.Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for number, prompt in enumerate(config.prompts):
        image = {"image": Image.open(images[number])} if images else {}
        latents = pipeline(
            prompt=prompt, negative_prompt=config.negative_prompt, height=config.size.height, width=config.size.width,
            num_frames=config.num_frames, num_inference_steps=config.num_steps, guidance_scale=config.guidance_scale,
            latents=sample.initial_noise((1, 16, 2, 4, 6), config.seed + number), output_type="latent",
            return_dict=False, **image,
        )[0]  # fmt: skip
        found.append(latents[0])
    return found


def test_image_to_video_equals_diffusers(tiny_i2v_model: Path, images: tuple[str, ...]) -> None:
    config = replace(CONFIG, images=images)
    expected = theirs(config, WanImageToVideoPipeline.from_pretrained(tiny_i2v_model), images)
    for found, wanted in zip(ours(config, tiny_i2v_model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_text_to_video_equals_diffusers(tiny_model: Path) -> None:
    expected = theirs(CONFIG, WanPipeline.from_pretrained(tiny_model), ())
    for found, wanted in zip(ours(CONFIG, tiny_model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_samples_follow_their_images(tiny_i2v_model: Path, images: tuple[str, ...], tmp_path: Path) -> None:
    """By content, not by name."""
    config = replace(CONFIG, images=images, num_steps=1)
    record = sample.run(config, tiny_i2v_model, tmp_path / "out", device="cpu")
    assert [video.name for video in record.videos] == ["000.mp4", "001.mp4"]
    copies = []
    for number, name in enumerate(images):
        copies.append(str(tmp_path / f"copy{number}.png"))
        Path(copies[-1]).write_bytes(Path(name).read_bytes())
    assert sample.run(replace(config, images=tuple(copies)), tiny_i2v_model, tmp_path / "out") == record
    other = replace(config, images=images[::-1])
    assert sample.stage_fingerprint(other, tiny_i2v_model) != record.fingerprint


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("tiny_i2v_model", (), "0 images are given for 2 videos of an image-to-video model, which needs the first"),
        ("tiny_i2v_model", ("a.png", "b.png"), r"image a\.png, b\.png does not exist; give a \.png"),
        ("tiny_model", ("a.png",), r"images=\('a\.png',\) are given to a text-to-video model, which takes none"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, given: tuple[str, ...], sentence: str
) -> None:
    model = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match=sentence):
        sample.run(replace(CONFIG, images=given), model, tmp_path / "out")
    with pytest.raises(ValueError, match=sentence):
        next(sample.sample_videos(replace(CONFIG, images=given), model, None, CPU))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("t2v-2B", "--task t2v-2B is unknown; choose one of t2v-1.3B"),
        ("t2v-14B", "--task t2v-14B, but the model is t2v-custom"),
        ("i2v-custom", "give --task t2v-custom"),
    ],
)
def test_another_task_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, sentence: str
) -> None:
    command = ["wan_core.sample", "--model", str(tiny_model), "--prompts", "a", "--task", task]
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path / "samples")])
    with pytest.raises(SystemExit, match=sentence):
        sample.main()
    assert not list(tmp_path.iterdir())
