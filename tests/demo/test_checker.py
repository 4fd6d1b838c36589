"""The checker against clips whose scene is known: as they come out of H.264, blurred, and noisy."""

from pathlib import Path

import numpy as np
import pytest

from wan_core.demo.checker import Seen, check_clip, parse_caption
from wan_core.demo.videos import FPS, ShapeScene, random_scene, render
from wan_core.encode.video import load_video, write_video

ALL_RIGHT = 0.95


def accuracy(scenes: list[ShapeScene], clips: list[np.ndarray]) -> dict[str, float]:
    pairs = [(scene, check_clip(clip)) for scene, clip in zip(scenes, clips, strict=True)]
    names = ("colour", "shape", "direction")
    return {
        name: float(np.mean([getattr(scene, name) == getattr(seen, name) for scene, seen in pairs])) for name in names
    }


def scenes_of(count: int, seed: int) -> list[ShapeScene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def blurred(frames: np.ndarray) -> np.ndarray:
    """Mean over 5x5 pixels."""
    padded = np.pad(frames.astype(np.float32), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return windows.mean(axis=(-2, -1)).astype(np.uint8)


def test_it_reads_clips_that_went_through_h264(tmp_path: Path):
    scenes, clips = scenes_of(120, seed=101), []
    for scene in scenes:
        write_video(tmp_path / "clip.mp4", render(scene), FPS)
        clips.append(load_video(tmp_path / "clip.mp4")[0])
    assert min(accuracy(scenes, clips).values()) >= ALL_RIGHT


def test_it_reads_blurred_and_noisy_clips():
    scenes, rng = scenes_of(60, seed=102), np.random.default_rng(0)
    clips = [
        blurred(render(scene)) + rng.normal(0, 12, (scene.num_frames, scene.height, scene.width, 3)) for scene in scenes
    ]
    found = accuracy(scenes, [np.clip(clip, 0, 255).astype(np.uint8) for clip in clips])
    assert min(found.values()) >= ALL_RIGHT


def test_specks_beside_the_shape_do_not_count():
    scene = ShapeScene("red", "square", "up", 64, 64, 9, radius=10, start=(45, 40), end=(20, 40))
    frames = render(scene)
    frames[:, 3:6, 3:9] = (40, 60, 250)
    assert check_clip(frames) == Seen("red", "square", "up")


def test_it_says_when_nothing_is_there_or_nothing_moves():
    empty = np.full((9, 64, 64, 3), 25, np.uint8)
    assert check_clip(empty) == Seen(None, None, None)
    scene = ShapeScene("blue", "circle", "left", 64, 64, 9, radius=10, start=(32, 40), end=(32, 40))
    assert check_clip(render(scene)) == Seen("blue", "circle", None)


def test_captions_are_read_and_others_refused():
    assert parse_caption("A yellow triangle, moving down.") == Seen("yellow", "triangle", "down")
    with pytest.raises(ValueError, match="names no shape; checker=shapes needs one of circle, square, triangle"):
        parse_caption("a red dog running left")
