"""First frames for image-to-video, against diffusers' WanImageToVideoPipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.encode.test_stage import CONFIG, add_clip, lines, read_samples
from tests.tiny import IMAGE_DIM
from wan_core.config import ShardConfig, Size
from wan_core.data import shards
from wan_core.data.parts import StoredSamples
from wan_core.data.samples import first_frame_of, read_members
from wan_core.digests import encoder_identity
from wan_core.encode import stage
from wan_core.encode.image import load_image_encoder, read_first_frame
from wan_core.encode.video import read_video
from wan_core.records import EncodeRecord


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first-frames") / "videos"
    for number, num_frames in enumerate((9, 5)):
        add_clip(folder, f"{number}.mp4", seed=number, num_frames=num_frames, caption=f"a red circle {number}")
    return folder


@pytest.fixture(scope="module")
def encoded(videos: Path, tiny_i2v_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeRecord:
    return stage.run(CONFIG, videos, tiny_i2v_model, tmp_path_factory.mktemp("encoded") / "out")


def test_first_frames_are_what_diffusers_makes_of_them(
    encoded: EncodeRecord, videos: Path, tiny_i2v_model: Path
) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_i2v_model)
    samples = read_samples(encoded)
    assert len(samples) == 2
    for line in lines(encoded.path / "clips.jsonl"):
        pixels = read_video(videos / line["path"], CONFIG)
        image, (num_frames, height, width) = Image.fromarray(pixels[0]), pixels.shape[:3]
        with torch.no_grad():
            embeds = pipeline.encode_image(image, "cpu")
            tensor = pipeline.video_processor.preprocess(image, height=height, width=width)
            _, channels = pipeline.prepare_latents(tensor, 1, 16, height, width, num_frames, torch.float32, "cpu")
        found = first_frame_of(samples[line["key"]])
        assert found is not None and found.embeds.shape == (257, IMAGE_DIM)
        torch.testing.assert_close(found.embeds, embeds[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.channels(), channels[0], rtol=1e-5, atol=1e-5)
        # The VAE looks back, never ahead: the first latent frame is the clip's own.
        torch.testing.assert_close(found.latents[:, 0], samples[line["key"]]["pth"][:, 0], rtol=1e-6, atol=1e-6)


def test_shards_keep_them_and_check_them(encoded: EncodeRecord, tmp_path: Path) -> None:
    samples = StoredSamples.of(encoded)
    sharded = shards.run(ShardConfig(val_share=0), encoded, tmp_path / "shard")
    assert json.loads((sharded.path / "encoder.json").read_text())["image_encoder"] == "CLIPVisionModel"
    raw = (sharded.path / "train-all.tar").read_bytes()
    for row, (key, original) in enumerate(read_samples(encoded).items()):
        stored = samples.read(samples.keys.index(key)).raw
        assert stored in raw, row
        assert first_frame_of(read_members(key, stored)) is not None
        assert read_members(key, stored).keys() == original.keys() and len(original) == 5
    part = encoded.path / "parts" / encoded.parts[0].name / "members.json"
    members = json.loads(part.read_text())
    offset, size = members[f"{samples.keys[0]}.image_embeds.pth"]
    damaged = shutil.copytree(encoded.path, tmp_path / "damaged")
    tar = damaged / "parts" / encoded.parts[0].name / "part.tar"
    altered = bytearray(tar.read_bytes())
    altered[offset + size // 2] ^= 1
    tar.write_bytes(altered)
    moved = replace(encoded, path=damaged, parts=tuple(damaged / "parts" / part.name for part in encoded.parts))
    with pytest.raises(ValueError, match=r"image_embeds\.pth' is refused: .*checksum"):
        StoredSamples.of(moved).read(0)


def test_the_image_encoder_is_part_of_what_a_dataset_is(
    encoded: EncodeRecord, videos: Path, tiny_i2v_model: Path, tmp_path: Path
) -> None:
    assert encoded.encoder == encoder_identity(tiny_i2v_model)
    model = shutil.copytree(tiny_i2v_model, tmp_path / "model")
    before = stage.look(CONFIG, videos, model).fingerprint
    assert before == encoded.fingerprint
    for name, change in (
        ("image_encoder/model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("image_processor/preprocessor_config.json", lambda raw: raw.replace(b"32", b"31")),
    ):
        path = model / name
        raw = path.read_bytes()
        path.write_bytes(change(raw))
        assert stage.look(CONFIG, videos, model).fingerprint != before, name
        path.write_bytes(raw)


@pytest.mark.parametrize("missing", ["image_encoder", "image_processor"])
def test_missing_parts_are_named_first(videos: Path, tiny_i2v_model: Path, tmp_path: Path, missing: str) -> None:
    model = shutil.copytree(tiny_i2v_model, tmp_path / "model")
    shutil.rmtree(model / missing)
    with pytest.raises(ValueError, match=f"has no {missing}/"):
        stage.run(CONFIG, videos, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_clip_that_does_not_fit_is_refused(tiny_i2v_model: Path, tmp_path: Path) -> None:
    """Sixteen patches in place of 256."""
    model = shutil.copytree(tiny_i2v_model, tmp_path / "model")
    path = model / "image_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": 8}))
    (model / "image_encoder" / "model.safetensors").unlink()
    config = json.loads(path.read_text())
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(model / "image_encoder")
    with pytest.raises(ValueError, match=r"gives 17 embeddings of 24, but the transformer attends to 257 of 24"):
        load_image_encoder(model, "cpu")


def test_an_image_is_scaled_to_cover_and_cut_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = read_first_frame(tmp_path / "wide.png", Size(32, 32))
    assert found.shape == (32, 32, 3) and (found[:, 2:-2] == 255).all()  # the scaling's filter looks beyond the cut
    exact = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(exact).save(tmp_path / "exact.png")
    assert np.array_equal(read_first_frame(tmp_path / "exact.png", Size(32, 48)), exact)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png cannot be read .*give a \.png, \.jpg or \.webp file"):
        read_first_frame(tmp_path / "text.png", Size(32, 32))
