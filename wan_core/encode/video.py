"""Video and image files to pixels at the frame rate, length and size of a config, and pixels to H.264 files."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from wan_core.config import VAE_TEMPORAL_STRIDE, EncodeConfig, Size
from wan_core.data.clips import IMAGE_SUFFIXES, Clip
from wan_core.encode.buckets import choose_bucket
from wan_core.encode.decode import (
    ClipError,
    decoded,
    decoded_from,
    frame_seconds,
    opened,
    plain,
    read_timeline,
    refused,
    resampled,
)
from wan_core.encode.picture import upright_rgb
from wan_core.encode.timeline import Timeline

# SWS_BILINEAR | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT. Without them swscale makes 10-bit video darker by 1.7 levels of
# 255 on average (8-bit: 0.5); with them converting takes five times as long.
EXACT = 0x2 | 0x40000 | 0x2000


def write_video(path: Path, frames: Any, fps: float, crf: int = 18) -> None:
    """Write an H.264 .mp4 (yuv420p); the same frames give the same bytes on any machine.

    Args:
        frames: uint8 [T, H, W, 3], an array or a CPU tensor; H and W even.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51.
    """
    pixels = np.ascontiguousarray(np.asarray(frames))
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or len(pixels) == 0:
        raise ValueError(f"frames are {pixels.dtype} {pixels.shape}, not uint8 [T, H, W, 3] with T >= 1; convert them")
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height}x{width} cannot be yuv420p, which halves both sides; choose even sides")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        # A clip's digest depends on its bytes, and x264's bytes on the number of threads and, through memory that
        # mbtree reads behind tiny frames, on chance.
        options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def load_video(path: Path) -> tuple[np.ndarray, float]:
    """Decode a whole file.

    Returns:
        frames uint8 [T, H, W, 3], and its average frames per second.

    Raises:
        ClipError: it is no video, or is damaged.
    """
    with opened(path) as (container, stream):
        frames = np.stack([_pixels(frame) for frame in decoded(container, stream)])
        return frames, float(stream.average_rate or 0)


def read_small(path: Path, height: int) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Every frame, scaled down to a height, and the average frames per second: uint8 [h, w, 3] in blue, green, red.

    Raises:
        ClipError: not a video, or damaged.
    """
    with opened(path) as (container, stream):
        rate = 1 / frame_seconds(stream)
        for frame in decoded(container, stream):
            small = min(height, frame.height)
            width = max(1, round(frame.width * small / frame.height))
            yield frame.reformat(width=width, height=small, format="bgr24").to_ndarray(), rate


def read_clip(path: Path, clip: Clip, config: EncodeConfig) -> np.ndarray:
    """Decode a clip, video or image, whose file lies at `path`: uint8 [T, H, W, 3], see `read_video`."""
    if not clip.path.lower().endswith(IMAGE_SUFFIXES):
        return read_video(path, config, clip.start_frame, clip.end_frame)
    if config.mode == "video":
        raise ClipError("an image cannot be encoded as a video; use mode=frames")
    return read_image(path, config)[None]


def read_video(path: Path, config: EncodeConfig, start: int = 0, end: int | None = None) -> np.ndarray:
    """Decode a clip at the frame rate, length and size of a config.

    Frames are picked by their timestamps (the nearest to each 1/fps), so variable frame rates come out right. The
    length is cut to 4n+1 frames, at most `max_frames`, or to a bucket's; mode `frames` takes the first frame only.

    Args:
        start, end: first and last frame (inclusive) in the file's own frames; None: to the file's end.

    Returns:
        uint8 [T, H, W, 3] with (H, W) the one of `config.sizes` that `choose_size` picks, or a bucket's.

    Raises:
        ClipError: not a video, truncated, or shorter than `min_frames`.
    """
    fps = Fraction(config.fps)
    # Where a frame lies is known without decoding those before it, and a bucket's length before decoding its first.
    times = read_timeline(path) if start > 0 or config.tokens_per_sample else None
    wanted, size = 1 if config.mode == "frames" else config.max_frames, None
    picked: list[np.ndarray] = []
    with opened(path) as (container, stream):
        for frame in resampled(decoded_from(container, stream, times, start), stream, fps, start, end):
            image, aspect = Image.fromarray(_pixels(frame)), _pixel_aspect(stream, frame)
            if size is None:
                wanted, size = _shape(config, image.size, aspect, wanted, times, start, end)
            picked.append(_fit(image, size, config.center_crop, aspect))
            if len(picked) == wanted:
                break
    if config.mode == "video" and len(picked) < config.min_frames:
        raise ClipError(f"too short: {len(picked)} frames at {config.fps:g} fps, min_frames is {config.min_frames}")
    if config.tokens_per_sample and len(picked) < wanted:
        raise ClipError(f"damaged video: {len(picked)} frames of {wanted} can be decoded")
    length = (len(picked) - 1) // VAE_TEMPORAL_STRIDE * VAE_TEMPORAL_STRIDE + 1
    return np.stack(picked[:length])


def _shape(
    config: EncodeConfig, source: tuple[int, int], aspect: float, wanted: int, times: Timeline | None, start: int,
    end: int | None,
) -> tuple[int, Size]:  # fmt: skip
    """Frames and size of a clip, from its first frame (width, height)."""
    width, height = source[0] * aspect, source[1]
    if not config.tokens_per_sample or times is None:
        return wanted, choose_size(height, width, config.sizes)
    last = len(times) - 1 if end is None else min(end, len(times) - 1)
    available = 1 if config.mode == "frames" else times.num_sampled(start, last, Fraction(config.fps))
    bucket = choose_bucket(config, available, height, width)
    if bucket is None:
        raise ClipError(f"too short: {available} frames at {config.fps:g} fps, less than every one of bucket_frames")
    return bucket.frames, bucket.size


def read_image(path: Path, config: EncodeConfig) -> np.ndarray:
    """Decode one image at a size of the config: uint8 [H, W, 3].

    Raises:
        ClipError: not an image, or truncated.
    """
    try:
        with refused("not a readable image", path), Image.open(path) as image:
            picture = upright_rgb(image)
            size = choose_size(picture.height, picture.width, config.sizes)
            if config.tokens_per_sample and (bucket := choose_bucket(config, 1, picture.height, picture.width)):
                size = bucket.size
            return _fit(picture, size, config.center_crop)
    except UnidentifiedImageError as error:
        raise ClipError("not a readable image: unknown or damaged format") from error
    except OSError as error:
        raise ClipError(f"not a readable image: {plain(error, path)}") from error


def choose_size(height: float, width: float, sizes: tuple[Size, ...]) -> Size:
    """The size of nearest aspect ratio; among equal ratios the one of nearest area, then the smaller (no upscaling)."""

    def distance(size: Size) -> tuple[float, float, int]:
        aspect = abs(np.log(size.width / size.height) - np.log(width / height))
        area = abs(np.log(size.width * size.height) - np.log(width * height))
        return round(float(aspect), 6), round(float(area), 6), size.width * size.height

    return min(sizes, key=distance)


def _fit(image: Image.Image, size: Size, center_crop: bool, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale to cover the size and cut the centre out, or stretch to it; in one antialiased resampling."""
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if center_crop:
        kept_width = min(width, height * size.width / size.height / pixel_aspect)
        kept_height = min(height, width * pixel_aspect * size.height / size.width)
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box))


def _pixels(frame: Any) -> np.ndarray:
    """A frame upright as uint8 [H, W, 3]; phones store theirs lying, with a rotation beside it."""
    deep = frame.format.components[0].bits > 8
    pixels = frame.reformat(format="rgb24", interpolation=EXACT if deep else None).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


def _pixel_aspect(stream: Any, frame: Any) -> float:
    """Width of a pixel over its height, as seen upright."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return 1 / aspect if frame.rotation % 180 else aspect
