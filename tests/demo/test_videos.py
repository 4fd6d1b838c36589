"""The demo set: what it shows, that it repeats, and that the encode stage reads it as meant."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from wan_core.config import EncodeConfig, Size
from wan_core.demo import COLOURS, DIRECTIONS, HELD_OUT, SHAPES, held_out_prompts
from wan_core.demo.videos import (
    MARGIN,
    NUM_FRAMES,
    SIZES,
    ShapeScene,
    make_videos,
    random_scene,
    render,
    training_scenes,
)
from wan_core.digests import file_digest
from wan_core.encode.video import ClipError, read_video


def test_training_leaves_out_the_held_out_combinations_and_shows_all_others():
    shown = [(scene.colour, scene.shape, scene.direction) for scene in training_scenes(192)]
    assert set(shown) == set(product(COLOURS, SHAPES, DIRECTIONS)) - set(HELD_OUT)
    counts = [shown.count(combination) for combination in set(shown)]
    assert max(counts) - min(counts) <= 1
    for known, place in ((COLOURS, 0), (SHAPES, 1), (DIRECTIONS, 2)):
        shares = [sum(combination[place] == name for combination in shown) / len(shown) for name in known]
        assert min(shares) > 0.7 / len(known)
    assert held_out_prompts()[0] == "a red circle moving down"


def test_scenes_cover_sizes_and_lengths():
    scenes = training_scenes(192)
    assert {(s.height, s.width, s.num_frames) for s in scenes} == {(*size, n) for size in SIZES for n in NUM_FRAMES}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_shape_has_its_colour_its_area_and_stays_inside(shape):
    radius = 10.0
    area = {"circle": np.pi * radius**2, "square": (2 * 0.88 * radius) ** 2, "triangle": 0.75 * 3**0.5 * 12.5**2}[shape]
    for seed in range(10):
        scene = random_scene(np.random.default_rng(seed), ("green", shape, "left"))
        frames = render(scene)
        assert frames.shape == (scene.num_frames, scene.height, scene.width, 3)
        shown = frames[..., 1] > 110  # half way from the background to the shape
        ys, xs = np.nonzero(shown.any(axis=0))
        assert ys.min() >= MARGIN - 1 and xs.min() >= MARGIN - 1
        assert ys.max() <= scene.height - MARGIN and xs.max() <= scene.width - MARGIN
        expected = area * (scene.radius / radius) ** 2
        assert shown.sum(axis=(1, 2)) == pytest.approx(expected, rel=0.1)  # an edge falls on whole pixels


def test_motion_is_at_least_ten_pixels():
    for scene in training_scenes(192):
        travel = np.subtract(scene.end, scene.start)
        assert np.dot(travel, DIRECTIONS[scene.direction]) >= 10
        assert np.count_nonzero(np.abs(travel) > 1e-6) == 1


def test_a_scene_outside_the_frame_is_refused():
    with pytest.raises(ValueError, match="outside the frame"):
        ShapeScene("red", "circle", "left", 64, 64, 9, radius=10, start=(32, 20), end=(32, 5))
    with pytest.raises(ValueError, match="choose at least 52"):
        training_scenes(20)


def test_the_set_repeats_to_the_byte_and_reads_as_meant(tmp_path: Path):
    for name in ("one", "two"):
        make_videos(tmp_path / name, seed=3, count=60)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 2 * 60 + 5
    for name in files:
        assert file_digest(tmp_path / "one" / name) == file_digest(tmp_path / "two" / name), name

    config = EncodeConfig(sizes=tuple(Size(*size) for size in SIZES), max_frames=17, min_frames=5)
    scene = training_scenes(60 + 3, seed=3)[0]
    frames = read_video(tmp_path / "one" / "clip_000.mp4", config)
    assert frames.shape == (scene.num_frames, scene.height, scene.width, 3)
    assert np.abs(frames.astype(int) - render(scene)).mean() < 3
    assert (tmp_path / "one" / "clip_000.txt").read_text().strip() == scene.caption
    for name, reason in (("broken_truncated", "not a readable video"), ("broken_short", "too short: 2 frames")):
        with pytest.raises(ClipError, match=reason):
            read_video(tmp_path / "one" / f"{name}.mp4", config)
    assert not (tmp_path / "one" / "broken_captionless.txt").exists()
