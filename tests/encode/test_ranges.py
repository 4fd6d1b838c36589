"""Windows, scene cuts and buckets, on really encoded files."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.encode.test_video import numbers, ramp
from wan_core.config import EncodeConfig, Size, num_tokens
from wan_core.data.clips import Clip, scan
from wan_core.data.folder import LocalFolder, open_folder
from wan_core.encode import stage
from wan_core.encode.buckets import ASPECTS, buckets, choose_bucket
from wan_core.encode.decode import ClipError, read_timeline
from wan_core.encode.ranges import cut, scene_cuts
from wan_core.encode.timeline import Timeline
from wan_core.encode.video import read_clip, read_video, write_video

CONFIG = EncodeConfig(sizes=(Size(64, 96),), max_frames=17)
WINDOWS = replace(CONFIG, window_frames=17)


def add(folder: Path, name: str, frames: np.ndarray, fps: float = 16, caption: str | None = "a caption") -> None:
    write_video(folder / name, frames, fps)
    if caption:
        (folder / name).with_suffix(".txt").write_text(caption)


def found(config: EncodeConfig, folder: Path) -> list[tuple[str, int, int | None]]:
    scanned = cut(config, open_folder(folder), scan(folder))
    return [(clip.path, clip.start_frame, clip.end_frame) for clip in scanned.clips]


@pytest.mark.parametrize(
    "num_frames, stride, expected",
    [
        (17, 0, [(0, 16)]),
        (50, 0, [(0, 16), (17, 33), (34, 49)]),  # 16 frames are left
        (38, 0, [(0, 16), (17, 33)]),  # 4 are below min_frames
        (42, 8, [(0, 16), (8, 24), (16, 32), (24, 40), (32, 41)]),
        (45, 20, [(0, 16), (20, 36), (40, 44)]),
        (4, 0, []),
    ],
)
def test_windows(tmp_path: Path, num_frames: int, stride: int, expected: list[tuple[int, int]]) -> None:
    add(tmp_path, "a.mp4", ramp(num_frames))
    config = replace(WINDOWS, window_stride=stride)
    assert found(config, tmp_path) == [("a.mp4", *pair) for pair in expected]
    scanned = cut(config, open_folder(tmp_path), scan(tmp_path))
    assert [bad.path for bad in scanned.quarantined] == ([] if expected else ["a.mp4"])
    for clip in scanned.clips:  # a window decodes to its own frames, and to no less than was promised
        last = clip.end_frame or 0
        whole = list(range(clip.start_frame, last + 1))
        picked = numbers(read_clip(tmp_path / "a.mp4", clip, config))
        assert picked == whole[: (len(whole) - 1) // 4 * 4 + 1] and clip.caption == "a caption"


@pytest.mark.parametrize("fps", [10.0, 24.0, 30000 / 1001, 60.0])
def test_windows_at_any_rate_are_full_and_do_not_drift(tmp_path: Path, fps: float) -> None:
    num_frames = round(5.2 * fps)
    levels = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (num_frames, 64, 96, 3))
    add(tmp_path, "a.mp4", levels, fps)
    clips = cut(WINDOWS, open_folder(tmp_path), scan(tmp_path)).clips
    times = read_timeline(tmp_path / "a.mp4")
    assert len(clips) == 5  # 4 x 17 frames at 16 fps are 4.25 s, and 0.95 s are left
    for i, clip in enumerate(clips):
        assert abs(times.time(clip.start_frame) - Fraction(17, 16) * i) <= times.step
        length = len(read_video(tmp_path / "a.mp4", CONFIG, clip.start_frame, clip.end_frame))
        assert length == 17 if i < 4 else 5 <= length < 17


def test_number_of_sampled_frames_is_known_without_decoding(tmp_path: Path) -> None:
    config = EncodeConfig(sizes=CONFIG.sizes, min_frames=1)
    for fps in (8, 16, 24, 25, 50):
        write_video(tmp_path / "a.mp4", ramp(40), fps)
        times = read_timeline(tmp_path / "a.mp4")
        for start, end in ((0, 39), (3, 25), (7, 9), (5, 5)):
            known = times.num_sampled(start, end, Fraction(16))
            picked = len(read_video(tmp_path / "a.mp4", config, start, end))
            assert picked == min(81, (known - 1) // 4 * 4 + 1), (fps, start, end)


def test_windows_stay_inside_the_range_of_a_row(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", ramp(50), caption=None)
    (tmp_path / "meta.csv").write_text("file_name,caption,start_frame,end_frame\na.mp4,x,10,40\na.mp4,y,45,60\n")
    assert found(WINDOWS, tmp_path) == [("a.mp4", 10, 26), ("a.mp4", 27, 40)]
    (bad,) = cut(WINDOWS, open_folder(tmp_path), scan(tmp_path)).quarantined
    assert bad.path == "a.mp4" and "the file has 50 frames" in bad.reason


def scenes(lengths: list[int]) -> np.ndarray:
    """Flat pictures of different colours, one per scene, with some texture."""
    texture = np.random.default_rng(0).integers(0, 40, (64, 96, 3), dtype=np.uint8)
    colours = [(200, 30, 30), (20, 160, 40), (30, 40, 210), (190, 190, 30)]
    return np.concatenate([np.stack([texture + np.uint8(colours[i])] * n) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_clips_end_at_scene_cuts_and_windows_lie_inside(tmp_path: Path, detector: str) -> None:
    add(tmp_path, "a.mp4", scenes([20, 30, 12]))
    config = replace(CONFIG, scene_detector=detector)
    assert scene_cuts(tmp_path / "a.mp4", config) == [20, 50]
    assert found(config, tmp_path) == [("a.mp4", 0, 19), ("a.mp4", 20, 49), ("a.mp4", 50, 61)]
    windows = [("a.mp4", 0, 16), ("a.mp4", 20, 36), ("a.mp4", 37, 49), ("a.mp4", 50, 61)]
    assert found(replace(config, window_frames=17), tmp_path) == windows
    if detector == "content":
        assert found(replace(config, scene_threshold=250.0), tmp_path) == [("a.mp4", 0, 61)]


def test_planning_again_opens_no_file(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    add(tmp_path, "a.mp4", ramp(50))
    add(tmp_path, "b.mp4", ramp(30))
    (tmp_path / "c.mp4").write_bytes(b"no video")
    (tmp_path / "c.txt").write_text("c")
    folder, opened = LocalFolder(tmp_path), list[str]()
    local = folder.local
    monkeypatch.setattr(folder, "local", lambda name, wanted: (opened.append(name), local(name, wanted))[1])
    first = cut(WINDOWS, folder, scan(tmp_path))
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mp4"]
    assert cut(WINDOWS, folder, scan(tmp_path)) == first
    assert sorted(opened[3:]) == ["c.mp4"]  # what failed is tried again
    cut(replace(WINDOWS, window_stride=8), folder, scan(tmp_path))
    assert len(opened) == 7
    (bad,) = first.quarantined
    assert "not a readable video" in bad.reason


BUCKETS = EncodeConfig(sizes=(Size(480, 832), Size(720, 1280), Size(240, 416)), tokens_per_sample=32_760)


def test_buckets_keep_to_the_budget_and_the_grid() -> None:
    every = buckets(BUCKETS)
    assert {bucket.aspect for bucket in every} == set(ASPECTS)
    areas = {size.height * size.width for size in BUCKETS.sizes}
    for bucket in every:
        height, width = bucket.size.height, bucket.size.width
        assert height % 16 == width % 16 == 0 and bucket.frames in BUCKETS.bucket_frames
        assert bucket.num_tokens == ((bucket.frames - 1) // 4 + 1) * (height // 16) * (width // 16) <= 32_760
        assert max(area for area in areas if area * 0.9 <= height * width) >= height * width
        assert abs(np.log(width / height * bucket.aspect[1] / bucket.aspect[0])) < 0.1
    assert Size(480, 832) in {bucket.size for bucket in every} and Size(832, 480) in {bucket.size for bucket in every}


@pytest.mark.parametrize(
    "frames, height, width, expected",
    [
        (81, 1080, 1920, (81, 480, 832)),  # 32,760 tokens; 81 frames at 720p would be 75,600
        (40, 1080, 1920, (33, 720, 1280)),  # 32,400
        (200, 1920, 1080, (81, 832, 480)),
        (81, 480, 854, (81, 480, 832)),
        (33, 480, 854, (33, 480, 832)),  # no scaling up to 720p
        (81, 100, 178, (81, 240, 416)),  # smaller than any
        (16, 1080, 1920, None),
        (81, 700, 700, (81, 624, 624)),
    ],
)
def test_a_clip_takes_the_bucket_of_most_tokens(
    frames: int, height: int, width: int, expected: tuple[int, int, int] | None
) -> None:
    bucket = choose_bucket(BUCKETS, frames, height, width)
    assert (bucket and (bucket.frames, bucket.size.height, bucket.size.width)) == expected


def test_clips_decode_to_their_buckets(tmp_path: Path) -> None:
    config = EncodeConfig(sizes=(Size(64, 96),), tokens_per_sample=200, bucket_frames=(5, 17), max_frames=17)
    for name, shape, expected in (
        ("wide", (30, 128, 192), (17, 64, 96)), ("short", (9, 128, 192), (5, 64, 96)),
        ("tall", (30, 192, 128), (17, 96, 64)), ("square", (5, 80, 80), (5, 64, 64)),
    ):  # fmt: skip
        write_video(tmp_path / f"{name}.mp4", np.zeros((*shape, 3), np.uint8), 16)
        frames = read_video(tmp_path / f"{name}.mp4", config)
        assert frames.shape == (*expected, 3) and num_tokens(len(frames), Size(*expected[1:])) <= 200
    still = replace(config, mode="frames", min_frames=1)
    assert read_video(tmp_path / "wide.mp4", still).shape == (1, 64, 96, 3)


def test_buckets_keep_to_the_lengths_of_the_config(tmp_path: Path) -> None:
    config = EncodeConfig(
        sizes=(Size(64, 96),), tokens_per_sample=1000, bucket_frames=(5, 9, 17, 33), min_frames=9, max_frames=17
    )
    for num_frames, expected in ((40, 17), (16, 9)):
        write_video(tmp_path / f"{num_frames}.mp4", np.zeros((num_frames, 64, 96, 3), np.uint8), 16)
        assert len(read_video(tmp_path / f"{num_frames}.mp4", config)) == expected
    write_video(tmp_path / "8.mp4", np.zeros((8, 64, 96, 3), np.uint8), 16)
    with pytest.raises(ClipError, match="too short: 8 frames at 16 fps"):  # not cut to 5, below min_frames
        read_video(tmp_path / "8.mp4", config)
    none = replace(config, bucket_frames=(5, 33))
    with pytest.raises(ValueError, match=r"has no length from min_frames=9 to max_frames=17 .*for example 9"):
        stage.look(none, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tokens_per_sample": 100}, "tokens_per_sample=100 is below 7800.*smallest bucket"),
        ({"bucket_frames": (16,)}, "bucket_frames=16 is not 4n\\+1"),
        ({"window_frames": 40}, "window_frames=40 is not 4n\\+1"),
        ({"window_frames": 97}, "window_frames=97 is not between min_frames=5 and max_frames=81"),
        ({"window_stride": 8}, "window_stride=8 needs window_frames"),
        ({"scene_threshold": 9.0}, "scene_threshold=9.0 needs scene_detector"),
        ({"fps": math.nan}, "fps=nan is not a finite number; choose 16.0"),
        ({"fps": math.inf}, "fps=inf is not a finite number; choose 16.0"),
        ({"max_quarantine_share": math.nan}, "max_quarantine_share=nan is not a finite number; choose 0.2"),
        ({"fps": 0.0}, "fps=0.0 is not above 0; choose 16.0"),
    ],
)
def test_settings_that_cannot_work_say_so(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncodeConfig(**settings)  # type: ignore[arg-type]


def test_timeline_by_hand() -> None:
    timeline = Timeline(np.array([0, 1, 2, 6, 7]), Fraction(1, 4), Fraction(1, 4), Fraction(1, 4))
    assert timeline.windows(0, 4, Fraction(4), 3, 3) == [(0, 2), (3, 4)]  # nothing is shown between 0.75 and 1.5 s
    assert timeline.num_sampled(0, 4, Fraction(4)) == 8 and timeline.num_sampled(1, 2, Fraction(2)) == 2
    assert Clip("a", "b", "c").key != Clip("a", "b", "c", 1).key
