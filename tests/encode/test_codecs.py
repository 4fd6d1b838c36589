"""Files as cameras and the web make them, really encoded: every codec, ten bits, sound, odd time stamps, seeking."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.encode.test_video import numbers, ramp, remux
from wan_core.config import EncodeConfig, Size
from wan_core.encode.decode import ClipError, read_timeline
from wan_core.encode.video import read_video, write_video

CONFIG = EncodeConfig(sizes=(Size(64, 96),))
# codec, pixel format, suffix, options
KINDS = {
    "h264": ("libx264", "yuv420p", ".mp4", {}),
    "h264 10 bit": ("libx264", "yuv420p10le", ".mov", {}),
    "h264 4:4:4": ("libx264", "yuv444p", ".mkv", {}),
    "hevc": ("libx265", "yuv420p", ".mp4", {"x265-params": "log-level=none"}),
    "hevc 10 bit": ("libx265", "yuv420p10le", ".mkv", {"x265-params": "log-level=none"}),
    "vp8 in webm": ("libvpx", "yuv420p", ".webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "crf": "4", "b": "4M"}),
    "vp9 in webm": ("libvpx-vp9", "yuv420p", ".webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1": ("libsvtav1", "yuv420p", ".mp4", {"preset": "12"}),
    "av1 10 bit": ("libsvtav1", "yuv420p10le", ".webm", {"preset": "12"}),
    "prores": ("prores_ks", "yuv422p10le", ".mov", {}),
}
NUM_FRAMES = 50


def encode(path: Path, kind: str, frames: np.ndarray, fps: int = 16, sound: bool = False) -> Path:
    codec, pixel_format, suffix, options = KINDS[kind]
    path = path.with_suffix(suffix)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], pixel_format, 12
        audio = container.add_stream("aac", rate=48000) if sound else None
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if audio is not None:
            samples = np.zeros((1, 2 * 48000 * 2), np.int16)
            silence = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            silence.sample_rate, silence.pts = 48000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_decodes_whole_and_from_the_middle(tmp_path: Path, kind: str) -> None:
    path = encode(tmp_path / "clip", kind, ramp(NUM_FRAMES), sound=kind == "hevc")
    assert numbers(read_video(path, CONFIG)) == list(range(49))
    assert len(read_timeline(path)) == NUM_FRAMES
    for start, end in ((1, None), (12, 28), (29, 37), (45, 49)):
        last = NUM_FRAMES - 1 if end is None else end
        expected = list(range(start, last + 1))
        assert numbers(read_video(path, CONFIG, start, end)) == expected[: (len(expected) - 1) // 4 * 4 + 1]


def test_a_seek_gives_what_decoding_from_the_start_gives(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 8, 12, 3), dtype=np.uint8)
    path = encode(tmp_path / "clip", "h264", noise.repeat(8, 1).repeat(8, 2))
    whole = read_video(path, CONFIG)
    for start in (5, 11, 12, 13, 25):
        assert np.array_equal(read_video(path, CONFIG, start, start + 4), whole[start : start + 5])


@pytest.mark.parametrize("start", [-2, 0, 3])
def test_time_stamps_may_begin_anywhere(tmp_path: Path, start: int) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=16, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 16)
        for i, pixels in enumerate(ramp(20)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i + 16 * start, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    try:
        assert numbers(read_video(path, CONFIG)) == list(range(17))
        assert numbers(read_video(path, CONFIG, 7)) == list(range(7, 20))[:13]
    except ClipError as error:  # Matroska cannot hold all negative times: cut or refused, never shifted
        assert start < 0, error


@pytest.mark.parametrize("cover", [False, True])
def test_sound_with_or_without_cover_art_is_no_video(tmp_path: Path, cover: bool) -> None:
    path = sound(tmp_path / "sound.mp4", cover)
    assert path.read_bytes().count(b"covr") == cover
    with pytest.raises(ClipError, match="it holds no video stream"):
        read_video(path, CONFIG)


def sound(path: Path, cover: bool) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = 64, 96, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(ramp(1)[0], format="rgb24")))
            container.mux(picture.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.int16), format="s16", layout="stereo")
        silence.sample_rate, silence.pts = 48000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


def test_one_frame_at_any_rate_is_an_image(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", ramp(1), 60)
    frames = EncodeConfig(sizes=CONFIG.sizes, mode="frames")
    assert numbers(read_video(tmp_path / "clip.mp4", frames)) == [0]
    with pytest.raises(ClipError, match="too short: 1 frames"):
        read_video(tmp_path / "clip.mp4", CONFIG)


def test_time_stamps_survive_another_container(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", ramp(50), 48)
    webm = remux(tmp_path / "clip.mp4", tmp_path / "clip.mkv")  # rounds to milliseconds
    for start, end in ((0, None), (10, 40)):
        expected = read_video(tmp_path / "clip.mp4", CONFIG, start, end)
        assert np.array_equal(read_video(webm, CONFIG, start, end), expected)
