from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from wan_core.config import EncodeConfig, Size
from wan_core.data.clips import Clip
from wan_core.encode.decode import ClipError
from wan_core.encode.video import choose_size, load_video, read_clip, read_video, write_video

CONFIG = EncodeConfig(sizes=(Size(64, 96),))


def ramp(num_frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame i is uniformly grey at 4 i + 10, so that a decoded frame tells its number."""
    levels = (4 * np.arange(num_frames) + 10).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return np.rint((frames[:, 20, 20, 0].astype(float) - 10) / 4).astype(int).tolist()


def remux(source: Path, target: Path, **options: str) -> Path:
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("fps", [16, 24, Fraction(24000, 1001), 30, 60, 8])
def test_resampling_picks_the_frame_nearest_in_time(tmp_path: Path, fps: Fraction) -> None:
    write_video(tmp_path / "clip.mp4", ramp(50), float(fps))
    found = numbers(read_video(tmp_path / "clip.mp4", CONFIG))
    length = int(Fraction(50) / fps * 16 + Fraction(1, 100))
    expected = [-(-(k * fps / 16 - Fraction(1, 2)) // 1) for k in range((length - 1) // 4 * 4 + 1)]  # ties go down
    assert found == [int(number) for number in expected][:81]


def test_variable_frame_rate_is_resampled_by_time(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 4, 5, 6, 7, 15, 16]  # in sixteenths of a second: frame 7 lasts half a second
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 16)
        for time, pixels in zip(times, ramp(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(read_video(tmp_path / "clip.mp4", CONFIG)) == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9]


@pytest.mark.parametrize("num_frames, expected", [(5, 5), (8, 5), (9, 9), (12, 9), (100, 81)])
def test_length_is_4n_plus_1(tmp_path: Path, num_frames: int, expected: int) -> None:
    write_video(tmp_path / "clip.mp4", np.zeros((num_frames, 64, 96, 3), np.uint8), 16)
    assert len(read_video(tmp_path / "clip.mp4", CONFIG)) == expected


def test_frame_range_is_inclusive(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", ramp(20), 16)
    assert numbers(read_video(tmp_path / "clip.mp4", CONFIG, 3, 11)) == list(range(3, 12))
    assert numbers(read_video(tmp_path / "clip.mp4", CONFIG, 11, 20)) == list(range(11, 20))  # end given as a count
    for start, end in ((11, 21), (20, None)):
        with pytest.raises(ClipError, match="the file has 20 frames"):
            read_video(tmp_path / "clip.mp4", CONFIG, start, end)


def test_frames_mode_takes_one_frame_of_videos_and_images(tmp_path: Path) -> None:
    config = EncodeConfig(sizes=CONFIG.sizes, mode="frames")
    write_video(tmp_path / "clip.mp4", ramp(2), 16)
    Image.fromarray(ramp(1)[0]).save(tmp_path / "image.png")
    assert numbers(read_video(tmp_path / "clip.mp4", config)) == [0]
    image = Clip("image.png", "digest", "caption")
    assert np.array_equal(read_clip(tmp_path / "image.png", image, config), ramp(1))
    with pytest.raises(ClipError, match="mode=frames"):
        read_clip(tmp_path / "image.png", image, CONFIG)


def test_write_then_load_keeps_pixels_rate_and_bytes(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :96]
    frames = np.stack([np.stack([2 * x, 3 * y, 0 * x + 10 * t], -1) for t in range(9)]).astype(np.uint8)
    write_video(tmp_path / "one.mp4", frames, 12.5)
    write_video(tmp_path / "two.mp4", frames, 12.5)
    loaded, fps = load_video(tmp_path / "one.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert loaded.shape == frames.shape and loaded.dtype == np.uint8 and fps == 12.5
    assert np.abs(loaded.astype(int) - frames).mean() < 2


@pytest.mark.parametrize("frames", [np.zeros((3, 63, 96, 3), np.uint8), np.zeros((3, 64, 96, 3), np.float32)])
def test_write_refuses_what_h264_cannot_hold(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"choose even sides|convert them"):
        write_video(tmp_path / "clip.mp4", frames, 16)


def test_cover_crop_keeps_shapes_and_stretch_keeps_edges(tmp_path: Path) -> None:
    frames = np.zeros((5, 128, 384, 3), np.uint8)  # 1:3 to 2:3: the crop keeps the middle half
    frames[:, :, 96:288] = 255
    write_video(tmp_path / "clip.mp4", frames, 16)
    cropped = read_video(tmp_path / "clip.mp4", CONFIG)[0]
    stretched = read_video(tmp_path / "clip.mp4", EncodeConfig(sizes=CONFIG.sizes, center_crop=False))[0]
    assert cropped.shape == stretched.shape == (64, 96, 3)
    assert (cropped[:, 3:-3] > 240).all()
    assert (stretched[:, :20] < 15).all() and (stretched[:, 28:68] > 240).all() and (stretched[:, 76:] < 15).all()


def test_choose_size_by_aspect_then_area() -> None:
    sizes = (Size(480, 832), Size(832, 480), Size(240, 416), Size(480, 480))
    assert choose_size(1920, 1080, sizes) == Size(832, 480)
    assert choose_size(1080, 1920, sizes) == Size(480, 832)
    assert choose_size(200, 350, sizes) == Size(240, 416)
    assert choose_size(500, 500, sizes) == Size(480, 480)


def test_rotated_phone_video_is_turned_upright(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    frames[:, :, :48] = 255  # left half white
    write_video(tmp_path / "clip.mp4", frames, 16)
    one, minus, zero, unit = (n.to_bytes(4, "big") for n in (0x10000, 0xFFFF0000, 0, 0x40000000))
    upright = one + 3 * zero + one + 3 * zero + unit
    raw = (tmp_path / "clip.mp4").read_bytes()
    track = raw.index(b"tkhd")
    assert raw.index(upright, track) - track < 100
    turned = zero + one + zero + minus + 4 * zero + unit  # shown a quarter turn clockwise
    (tmp_path / "clip.mp4").write_bytes(raw[:track] + raw[track:].replace(upright, turned, 1))
    shown = load_video(tmp_path / "clip.mp4")[0][0]
    assert shown.shape == (96, 64, 3)
    assert shown[:40].min() > 230 and shown[56:].max() < 25  # the left half is on top


def test_colours_of_bt709_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = 96, 64, "yuv420p", 1
        rgb = av.VideoFrame.from_ndarray(np.full((64, 96, 3), (200, 40, 0), np.uint8), format="rgb24")
        frame = rgb.reformat(format="yuv420p", dst_colorspace="itu709")
        frame.colorspace = 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixel = load_video(tmp_path / "clip.mp4")[0][0, 30, 30].astype(int)
    assert np.abs(pixel - (200, 40, 0)).max() <= 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_truncated_and_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "plain.mp4", noise, 16)
    # With its index in front a cut .mp4 still opens, and yields its first frames.
    whole = remux(tmp_path / "plain.mp4", tmp_path / f"whole{suffix}", movflags="faststart")
    assert len(read_video(whole, CONFIG)) == 37
    raw = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for share in (0.01, 0.3, 0.6, 0.9):
        cut.write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(ClipError, match=r"truncated|damaged|not a readable"):
            read_video(cut, CONFIG)
    middle = len(raw) // 2
    cut.write_bytes(raw[:middle] + bytes(5000) + raw[middle + 5000 :])
    with pytest.raises(ClipError, match=r"truncated|damaged"):
        read_video(cut, CONFIG)


def test_other_bad_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    write_video(tmp_path / "short.mp4", ramp(2), 16)
    for name, config, reason in (
        ("empty.mp4", CONFIG, "empty file"),
        ("text.mp4", CONFIG, "not a readable video"),
        ("text.png", EncodeConfig(sizes=CONFIG.sizes, mode="frames"), "not a readable image"),
        ("short.mp4", CONFIG, "too short: 2 frames at 16 fps, min_frames is 5"),
    ):
        with pytest.raises(ClipError, match=reason):
            read_clip(tmp_path / name, Clip(name, "digest", "caption"), config)
