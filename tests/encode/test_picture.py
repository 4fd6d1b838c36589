"""Image files of unusual pixels, written by Pillow, come out as arithmetic says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_core.config import EncodeConfig, Size
from wan_core.encode.video import read_image

SIDE = 32
CONFIG = EncodeConfig(sizes=(Size(SIDE, SIDE),), mode="frames")
RAMP = np.linspace(0, 255, SIDE * SIDE).round().astype(np.uint8).reshape(SIDE, SIDE)


def read(image: Image.Image, path: Path, **options: int) -> np.ndarray:
    image.save(path, **options)
    return read_image(path, CONFIG)


def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
    found = read(Image.fromarray(grey), tmp_path / "grey.png")
    assert Image.open(tmp_path / "grey.png").mode == "I;16"
    assert np.array_equal(found, np.rint(grey / 257).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_over_white(tmp_path: Path, mode: str) -> None:
    alpha = RAMP.T.copy()
    image = Image.fromarray(np.stack([RAMP] * (len(mode) - 1) + [alpha], 2), mode)
    expected = (RAMP.astype(float) * alpha + 255.0 * (255 - alpha)) / 255
    found = read(image, tmp_path / "picture.png").astype(float)
    assert np.abs(found - expected[..., None]).max() <= 1


def test_a_colour_that_stands_for_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.repeat(np.where(RAMP < 128, 10, 200).astype(np.uint8)[..., None], 3, 2)
    for mode, key in (("RGB", (10, 10, 10)), ("L", 10), ("P", 10)):
        image = Image.fromarray(pixels)
        image = Image.frombytes("P", image.size, pixels[..., 0].tobytes()) if mode == "P" else image.convert(mode)
        if mode == "P":
            image.putpalette([level for level in range(256) for _ in "rgb"])
        found = read(image, tmp_path / f"{mode}.png", transparency=key)
        assert np.array_equal(found, np.where(pixels == 10, 255, pixels)), mode


def test_opaque_pictures_keep_their_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / "rgb.png"), pixels)
    opaque = np.dstack([pixels, np.full((SIDE, SIDE), 255, np.uint8)])
    assert np.array_equal(read(Image.fromarray(opaque), tmp_path / "rgba.png"), pixels)
