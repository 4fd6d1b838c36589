"""A folder of broken and odd inputs, one kind per row of a table: each ends as a quarantined row with a reason, or is
encoded; its neighbours are encoded whatever it is, and nothing stays behind. What concerns a whole run follows below.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wan_core.config import EncodeConfig, Size
from wan_core.data.samples import Sample
from wan_core.encode import stage
from wan_core.encode.video import write_video

CONFIG = EncodeConfig(
    sizes=(Size(32, 32),), max_frames=9, text_dtype="float32", clips_per_part=8, max_quarantine_share=0.9
)


def pixels(num_frames: int = 9, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (num_frames, height, width, 3), dtype=np.uint8)


def good(path: Path, seed: int) -> bytes:
    write_video(path, pixels(seed=seed), 16)
    return path.read_bytes()


def video(
    path: Path, frames: np.ndarray, codec: str = "libx264", pixel_format: str = "yuv420p", times: str = "",
    container_format: str | None = None, **options: str,
) -> None:  # fmt: skip
    """A file of one's own making; times are in sixteenths of a second."""
    shown = [int(time) for time in times.split()] or list(range(len(frames)))
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        stream.codec_context.time_base = Fraction(1, 16)
        for time, rgb in zip(shown, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.int16), format="s16", layout="stereo")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damaged(path: Path, seed: int, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(good(path, seed)))


def broken_moov(raw: bytes) -> bytes:
    place = raw.index(b"stbl")
    return raw[:place] + bytes(200) + raw[place + 200 :]


def broken_middle(raw: bytes) -> bytes:
    place = raw.index(b"mdat") + 4
    return raw[: place + 2000] + bytes(1500) + raw[place + 3500 :]


def no_decoder(raw: bytes) -> bytes:
    place = raw.rindex(b"avc1")
    return raw[:place] + b"zzzz" + raw[place + 4 :]


def broken_png(path: Path) -> None:
    """The second of its chunks of pixels has lost its name."""
    Image.fromarray(pixels(1, 300, 300)[0]).save(path)
    raw = path.read_bytes()
    place = raw.index(b"IDAT", raw.index(b"IDAT") + 4)
    path.write_bytes(raw[:place] + b"\0\1\2\3" + raw[place + 4 :])


ENCODED = "encoded"
# kind -> (file name, what makes the file, what makes its caption file, reason of its row or ENCODED)
type Make = Callable[[Path], object]
type Kind = tuple[str, Make, bytes | str | None, str]
KINDS: dict[str, Kind] = {
    # files
    "zero bytes": ("a01.mp4", lambda p: p.touch(), "x", "empty file: 0 bytes"),
    "text named .mp4": ("a02.mp4", lambda p: p.write_text("no video"), "x", "not a readable video"),
    "random bytes": ("a03.mkv", lambda p: p.write_bytes(pixels().tobytes()), "x", "not a readable video"),
    "cut before its index": (
        "a04.mp4", lambda p: damaged(p, 4, lambda raw: raw[: len(raw) // 2]), "x", "not a readable video",
    ),
    "cut matroska": (
        "a05.mkv", lambda p: damaged(p, 5, lambda raw: raw[: len(raw) * 2 // 3]), "x", "truncated|damaged",
    ),
    "corrupt moov": ("a06.mp4", lambda p: damaged(p, 6, broken_moov), "x", "not a readable|damaged|no video stream"),
    "zeros in the stream": ("a07.mp4", lambda p: damaged(p, 7, broken_middle), "x", "damaged"),
    "an image named .mp4": (
        "a08.mp4", lambda p: Image.fromarray(pixels()[0]).save(p, "png"), "x", "too short|not a readable video",
    ),
    "matroska named .mp4": ("a09.mp4", lambda p: video(p, pixels(seed=9), container_format="matroska"), "x", ENCODED),
    "sound only": ("a10.mp4", sound, "x", "no video stream"),
    "one frame": ("a11.mp4", lambda p: write_video(p, pixels(1, seed=11), 30), "x", "too short: 1 frames"),
    "1x1 pixels": ("a12.mkv", lambda p: video(p, pixels(9, 1, 1, 12), "ffv1", "bgr0"), "x", ENCODED),
    "odd sides": ("a13.mkv", lambda p: video(p, pixels(9, 33, 47, 13), "ffv1", "bgr0"), "x", ENCODED),
    "8K": ("a14.mp4", lambda p: write_video(p, np.full((5, 4320, 7680, 3), 99, np.uint8), 16, crf=51), "x", ENCODED),
    "60:1 panorama": ("a15.mp4", lambda p: write_video(p, pixels(9, 16, 960, 15), 16), "x", ENCODED),
    "negative time stamps": (
        "a16.mkv",
        lambda p: video(p, pixels(seed=16), "ffv1", "bgr0", "-4 -3 -2 -1 0 1 2 3 4", avoid_negative_ts="disabled"),
        "x", ENCODED,
    ),
    "a gap of an hour": (
        "a17.mkv", lambda p: video(p, pixels(5, seed=17), "ffv1", "bgr0", "0 1 2 3 57600"), "x", ENCODED,
    ),
    "unread format": ("a18.avi", lambda p: p.write_bytes(b"RIFF"), "x", r"\.avi is not one of"),
    "name that is not UTF-8": (
        os.fsdecode(b"a19\xff.mp4"), lambda p: good(p, 19), "x", "file name is not UTF-8",
    ),
    "name of other scripts": ("a20 кот 猫 🐈.mp4", lambda p: good(p, 20), "x", ENCODED),
    "name with a line break": ("a21\n.mp4", lambda p: good(p, 21), "x", ENCODED),
    "link to nothing": ("a22.mp4", lambda p: p.symlink_to("nowhere.mp4"), "x", "cannot be read"),
    "link to itself": ("a23.mp4", lambda p: p.symlink_to(p.name), "x", "cannot be read"),
    "folder named .mp4": ("a24.mp4", lambda p: good(p / "inside.mp4", 24), None, ENCODED),
    "folder that holds itself": ("a25", lambda p: p.symlink_to(p.parent, target_is_directory=True), None, "lies in"),
    "the same clip again": ("a26.mp4", lambda p: good(p, 20), "x", "duplicate"),
    "codec without a decoder": ("a27.mp4", lambda p: damaged(p, 27, no_decoder), "x", "has no decoder for its codec"),
    # captions
    "no caption": ("b01.mp4", lambda p: good(p, 101), None, "no caption"),
    "empty caption": ("b02.mp4", lambda p: good(p, 102), " \n\t", "no caption"),
    "caption not UTF-8": ("b03.mp4", lambda p: good(p, 103), b"caf\xe9", "codec can't decode"),
    "caption in UTF-16": ("b04.mp4", lambda p: good(p, 104), "a circle".encode("utf-16"), "codec can't decode"),
    "caption of 3 million letters": ("b05.mp4", lambda p: good(p, 105), "long " * 600_000, "caption of 2999999 char"),
    "caption beyond 512 tokens": ("b06.mp4", lambda p: good(p, 106), "circle " * 2000, ENCODED),
    "caption of zeros": ("b07.mp4", lambda p: good(p, 107), "\0\0", ENCODED),
    "JSON without a caption": ("b08.mp4", lambda p: good(p, 108), '{"title": "x"}', "no caption"),
    "JSON cut short": ("b09.mp4", lambda p: good(p, 109), '{"caption": "x', "Unterminated string"),
    "JSON caption that is a number": ("b10.mp4", lambda p: good(p, 110), '{"caption": 7}', "type int is not text"),
    "half a surrogate pair": ("b11.mp4", lambda p: good(p, 111), '{"caption": "\\ud800"}', "surrogate"),
    "range beyond the end": (
        "b12.mp4", lambda p: good(p, 112), '{"caption": "x", "start_frame": 50}', "the file has 9 frames",
    ),
    "range backwards": (
        "b13.mp4", lambda p: good(p, 113), '{"caption": "x", "start_frame": 5, "end_frame": 2}', "is before start",
    ),
    "range that is no number": (
        "b14.mp4", lambda p: good(p, 114), '{"caption": "x", "end_frame": "many"}', "is not a frame number",
    ),
    "JSON nested too deeply": (
        "b16.mp4", lambda p: good(p, 116), '{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}", "b16.json: .*too deep",
    ),
    "two captions that differ": (
        "b17.mp4", lambda p: (good(p, 117), p.with_suffix(".json").write_text('{"caption": "y"}')), "x",
        "two captions: b17.txt and b17.json differ; keep one",
    ),
    "one caption twice": (
        "b18.mp4", lambda p: (good(p, 118), p.with_suffix(".json").write_text('{"caption": "x", "width": 9}')), "x",
        ENCODED,
    ),
    "range that is infinite": (
        "b15.mp4", lambda p: good(p, 115), '{"caption": "x", "end_frame": Infinity}', "is not a frame number",
    ),
}  # fmt: skip
# rows of meta.jsonl -> path of the row, and its reason or ENCODED
ROWS: dict[str, tuple[bytes, str, str]] = {
    "row of a good clip": (b'{"file_name": "c01.mp4", "caption": "x"}', "c01.mp4", ENCODED),
    "the same row again": (b'{"file_name": "c01.mp4", "caption": "x"}', "c01.mp4", "duplicate"),
    "row spelt otherwise": (b'{"file_name": "./c02.mp4", "caption": "x"}', "c02.mp4", ENCODED),
    "row of no file": (b'{"file_name": "c03.mp4", "caption": "x"}', "c03.mp4", "does not exist"),
    "row that leads outside": (b'{"file_name": "../../etc/x.mp4", "caption": "x"}', "../../etc/x.mp4", "outside"),
    "row with a root": (b'{"file_name": "/etc/passwd.mp4", "caption": "x"}', "/etc/passwd.mp4", "outside"),
    "row of another format": (b'{"file_name": "c04.exe", "caption": "x"}', "c04.exe", r"\.exe is not one of"),
    "row without a name": (b'{"caption": "x"}', "meta.jsonl, row 8", "no file_name"),
    "row that is no JSON": (b"{file_name: c05}", "meta.jsonl, row 9", "not JSON"),
    "row that is not UTF-8": (b'{"file_name": "caf\xe9.mp4"}', "meta.jsonl, row 10", "not JSON"),
    "row that is a list": (b'["c01.mp4"]', "meta.jsonl, row 11", "no file_name"),
    "row whose name is a list": (b'{"file_name": ["c01.mp4"], "caption": "x"}', "meta.jsonl, row 12", "no file_name"),
    "row nested too deeply": (b"[" * 100_000 + b"]" * 100_000, "meta.jsonl, row 13", "nested too deeply"),
}  # fmt: skip
# what only mode=frames reads: kind -> (file name, what makes the file, reason of its row or ENCODED)
PICTURES: dict[str, tuple[str, Make, str]] = {
    "picture": ("d01.png", lambda p: Image.fromarray(pixels(seed=401)[0]).save(p), ENCODED),
    "chunk without a name": ("d02.png", broken_png, "not a readable image: .*broken PNG file"),
    "cut picture": (
        "d03.png", lambda p: (Image.fromarray(pixels()[0]).save(p), p.write_bytes(p.read_bytes()[:999])), "truncated",
    ),
    "text named .jpg": ("d04.jpg", lambda p: p.write_text("no image"), "unknown or damaged format"),
    "empty picture": ("d05.webp", lambda p: p.touch(), "unknown or damaged format"),
}  # fmt: skip
NEIGHBOURS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, make, caption, _ in KINDS.values():
        make(folder / name)
        if caption is not None:
            text = caption if isinstance(caption, bytes) else caption.encode()
            suffix = ".json" if text.startswith(b"{") else ".txt"
            (folder / name).with_suffix(suffix).write_bytes(text)
    for name, make, _ in PICTURES.values():
        make(folder / name)
        (folder / name).with_suffix(".txt").write_text("a picture")
    (folder / "a24.mp4" / "inside.txt").write_text("x")
    for i in (1, 2):
        good(folder / f"c0{i}.mp4", 200 + i)
    for i in range(NEIGHBOURS):
        good(folder / f"z{i}.mp4", 300 + i)
        (folder / f"z{i}.txt").write_text("a circle")
    (folder / "meta.jsonl").write_bytes(b"\n".join(row for row, _, _ in ROWS.values()) + b"\n")
    return folder


def run(config: EncodeConfig, corpus: Path, model: Path, root: Path) -> dict[str, list[str]]:
    """Path -> its reasons, or ENCODED, after one run over all of them."""
    (root / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        record = stage.run(config, corpus, model, root / "out")
    found: dict[str, list[str]] = {}
    for line in map(json.loads, (root / "out" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()):
        found.setdefault(line["path"], []).append(line["reason"])
    for line in map(json.loads, (root / "out" / "clips.jsonl").read_text(encoding="utf-8").splitlines()):
        found.setdefault(line["path"], []).append(ENCODED)
    assert record.num_clips + record.num_quarantined == sum(map(len, found.values()))
    assert not list((root / "tmp").iterdir()) and not [p for p in root.rglob(".*") if p.name != ".lock"]
    return found


@pytest.fixture(scope="module")
def ended(corpus: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run(CONFIG, corpus, tiny_model, tmp_path_factory.mktemp("run"))


def shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def matching(reasons: list[str], expected: str) -> bool:
    return any(re.search(expected, reason) for reason in reasons)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_encoded_or_quarantined_with_its_reason(ended: dict[str, list[str]], kind: str) -> None:
    name, _, _, expected = KINDS[kind]
    path = "a24.mp4/inside.mp4" if kind == "folder named .mp4" else shown(name)
    assert matching(ended[path], expected), ended[path]


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_encoded_or_quarantined_with_its_reason(ended: dict[str, list[str]], kind: str) -> None:
    _, path, expected = ROWS[kind]
    assert matching(ended[path], expected), ended[path]


def test_nothing_else_is_lost(ended: dict[str, list[str]]) -> None:
    assert all(ended[f"z{i}.mp4"] == [ENCODED] for i in range(NEIGHBOURS))
    assert len(ended) == len(KINDS) + len({path for _, path, _ in ROWS.values()}) + NEIGHBOURS


OTHERWISE: dict[str, dict[str, Any]] = {
    "buckets": {"tokens_per_sample": 12, "bucket_frames": (5, 9)},
    "windows": {"window_frames": 9, "window_stride": 100_000},
    "scenes": {"scene_detector": "content"},
    "frames": {"mode": "frames"},
    "frames of buckets": {"mode": "frames", "tokens_per_sample": 12},
}


@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE)
def test_nothing_is_lost_by_other_ways_to_read(
    ended: dict[str, list[str]], corpus: Path, tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if "scene_detector" in settings:
        pytest.importorskip("scenedetect")
    found = run(replace(CONFIG, **settings), corpus, tiny_model, tmp_path)
    assert all(found[f"z{i}.mp4"] == [ENCODED] for i in range(NEIGHBOURS))
    pictures = PICTURES if settings.get("mode") == "frames" else {}
    assert found.keys() == ended.keys() | {name for name, _, _ in pictures.values()}
    for name, _, expected in pictures.values():
        assert matching(found[name], expected), (name, found[name])
    assert matching(found["a27.mp4"], "has no decoder for its codec"), found["a27.mp4"]


# What concerns a whole run.


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for i in range(3):
        good(folder / f"{i}.mp4", i)
        (folder / f"{i}.txt").write_text(f"a circle {i}")
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_model: Path) -> stage.Encoders:
    return stage.load_encoders(CONFIG, tiny_model, "cpu")


def test_latents_that_are_not_finite(
    videos: Path, tiny_model: Path, tmp_path: Path, encoders: stage.Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders.vae, "mean", torch.full_like(encoders.vae.mean, torch.nan))
    planned = stage.plan(CONFIG, stage.look(CONFIG, videos, tiny_model), tmp_path / "out")
    stage.encode_part(CONFIG, planned.parts[0], videos, tmp_path / "out", encoders)
    with pytest.raises(ValueError, match="3 of 3 clips are quarantined \\(3 x latents are not finite\\)"):
        stage.finish(CONFIG, planned, tmp_path / "out")


def test_full_disk(videos: Path, tiny_model: Path, tmp_path: Path, encoders: stage.Encoders) -> None:
    planned = stage.plan(CONFIG, stage.look(CONFIG, videos, tiny_model), tmp_path / "out")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a write beyond it fails as one to a full disk does
    try:
        with pytest.raises(OSError):
            stage.encode_part(CONFIG, planned.parts[0], videos, tmp_path / "out", encoders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "out" / "parts").iterdir())
    assert stage.encode_part(CONFIG, planned.parts[0], videos, tmp_path / "out", encoders).num_clips == 3


def test_read_only_output(videos: Path, tiny_model: Path, tmp_path: Path, encoders: stage.Encoders) -> None:
    planned = stage.plan(CONFIG, stage.look(CONFIG, videos, tiny_model), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(OSError, match=str(tmp_path / "out")):
            stage.encode_part(CONFIG, planned.parts[0], videos, tmp_path / "out", encoders)
    finally:
        os.seteuid(user)
    assert not list((tmp_path / "out").iterdir())


def test_output_that_is_a_file(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        stage.run(CONFIG, videos, tiny_model, tmp_path / "out")


def test_two_runs_on_one_output(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()
    encode_part = stage.encode_part

    def slowly(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert ended.wait(60)
        return encode_part(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(stage, "encode_part", slowly)
        first = pool.submit(stage.run, CONFIG, videos, tiny_model, tmp_path / "out")
        try:
            assert begun.wait(60)
            with pytest.raises(ValueError, match="another run is writing to it; wait for it to end"):
                stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
        finally:
            ended.set()
    assert first.result().num_clips == 3
    assert stage.run(CONFIG, videos, tiny_model, tmp_path / "out") == first.result()


@pytest.mark.parametrize("keys", ["../../etc/passwd", "a/b", "", "a.b"])
def test_keys_that_would_leave_the_archive(keys: str) -> None:
    with pytest.raises(AssertionError, match="key"):
        Sample(keys, torch.zeros(16, 1, 4, 4), torch.zeros(1, 8), None)  # type: ignore[arg-type]
