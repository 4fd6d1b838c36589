"""Video and image files to pixels at the frame rate, length and size of a config, and pixels to H.264 files."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError

from wan_core.config import VAE_TEMPORAL_STRIDE, EncodeConfig, Size
from wan_core.data.clips import IMAGE_SUFFIXES, Clip


class ClipError(ValueError):
    """A clip that cannot be used; the sentence is the reason that its quarantine row shows."""


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
    with _opened(path) as (container, stream):
        frames = np.stack([_pixels(frame) for frame in _decoded(container, stream)])
        return frames, float(stream.average_rate or 0)


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
    length is cut to 4n+1 frames, at most `max_frames`; mode `frames` takes the first frame only.

    Args:
        start, end: first and last frame (inclusive) in the file's own frames; None: to the file's end.

    Returns:
        uint8 [T, H, W, 3] with (H, W) the one of `config.sizes` that `choose_size` picks.

    Raises:
        ClipError: not a video, truncated, or shorter than `min_frames`.
    """
    wanted = 1 if config.mode == "frames" else config.max_frames
    with _opened(path) as (container, stream):
        picked = []
        for frame in _resampled(_decoded(container, stream), stream, Fraction(config.fps), start, end):
            picked.append(_fit(Image.fromarray(_pixels(frame)), config, _pixel_aspect(stream, frame)))
            if len(picked) == wanted:
                break
    if config.mode == "video" and len(picked) < config.min_frames:
        raise ClipError(f"too short: {len(picked)} frames at {config.fps:g} fps, min_frames is {config.min_frames}")
    length = (len(picked) - 1) // VAE_TEMPORAL_STRIDE * VAE_TEMPORAL_STRIDE + 1
    return np.stack(picked[:length])


def read_image(path: Path, config: EncodeConfig) -> np.ndarray:
    """Decode one image at a size of the config: uint8 [H, W, 3].

    Raises:
        ClipError: not an image, or truncated.
    """
    try:
        with Image.open(path) as image:
            # exif_transpose: cameras store the sensor's picture and, in a tag, how it was held.
            return _fit(ImageOps.exif_transpose(image).convert("RGB"), config)
    except UnidentifiedImageError as error:
        raise ClipError("not a readable image: unknown or damaged format") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ClipError(f"not a readable image: {_plain(error, path)}") from error


def choose_size(height: float, width: float, sizes: tuple[Size, ...]) -> Size:
    """The size of nearest aspect ratio; among equal ratios the one of nearest area, then the smaller (no upscaling)."""

    def distance(size: Size) -> tuple[float, float, int]:
        aspect = abs(np.log(size.width / size.height) - np.log(width / height))
        area = abs(np.log(size.width * size.height) - np.log(width * height))
        return round(float(aspect), 6), round(float(area), 6), size.width * size.height

    return min(sizes, key=distance)


def _fit(image: Image.Image, config: EncodeConfig, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale to cover the chosen size and cut the centre out, or stretch to it; in one antialiased resampling."""
    width, height = image.size
    size = choose_size(height, width * pixel_aspect, config.sizes)
    box = (0.0, 0.0, float(width), float(height))
    if config.center_crop:
        kept_width = min(width, height * size.width / size.height / pixel_aspect)
        kept_height = min(height, width * pixel_aspect * size.height / size.width)
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box))


class _opened:
    """Context manager: the container and its first video stream; what FFmpeg raises becomes a `ClipError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        if self.path.stat().st_size == 0:
            raise ClipError("empty file: 0 bytes")
        try:
            self.container = av.open(str(self.path))
        except FFmpegError as error:
            raise ClipError(f"not a readable video: {_plain(error, self.path)}") from error
        if not self.container.streams.video:
            self.container.close()
            raise ClipError("not a readable video: it holds no video stream")
        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        return self.container, stream

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.container.close()
        if isinstance(error, FFmpegError):
            raise ClipError(f"damaged video: {_plain(error, self.path)}") from error


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in display order; after the last one, an error unless they reach as far as the header promises."""
    end = Fraction(0)
    count = 0
    step = 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ClipError(f"damaged video: frame {count} has no timestamp")
        if frame.is_corrupt:
            raise ClipError(f"damaged video: frame {count} is corrupt")
        lasting = frame.duration * frame.time_base if frame.duration else step
        end = max(end, frame.pts * frame.time_base + lasting)
        count += 1
        yield frame
    if count == 0:
        raise ClipError("damaged video: no frame could be decoded")
    promised = Fraction(0)
    if stream.duration is not None:
        promised = ((stream.start_time or 0) + stream.duration) * stream.time_base
    elif container.duration is not None and len(container.streams) == 1:  # Matroska has no duration per stream
        promised = Fraction((container.start_time or 0) + container.duration, av.time_base)
    if promised - end > 2 * step:
        raise ClipError(f"truncated: {float(end):.2f} s of {float(promised):.2f} s can be decoded")


def _resampled(frames: Iterator[Any], stream: Any, fps: Fraction, start: int, end: int | None) -> Iterator[Any]:
    """For each k the frame nearest to the first frame's time + k / fps, as long as the clip lasts."""
    step = 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)
    previous, origin, k, count = None, Fraction(0), 0, 0
    for count, frame in enumerate(frames, start=1):
        if count <= start:
            continue
        time = frame.pts * frame.time_base
        if previous is None:
            origin = time
        else:
            before = previous.pts * previous.time_base
            while origin + k / fps <= (before + time) / 2:  # a tie goes to the earlier frame
                yield previous
                k += 1
        previous = frame
        if count - 1 == end:
            break
    # Some meta files give the number of frames as the end: one frame beyond the last is forgiven.
    if previous is None or (end is not None and count < end):
        raise ClipError(f"too short: the file has {count} frames, the clip asks for {start} to {end or 'its end'}")
    lasting = previous.duration * previous.time_base if previous.duration else step
    finish = previous.pts * previous.time_base + lasting
    # Containers round timestamps (WebM to milliseconds), so a step may miss the end by a hair.
    while origin + (k + 1) / fps <= finish + step / 8:
        yield previous
        k += 1


def _pixels(frame: Any) -> np.ndarray:
    """A frame upright as uint8 [H, W, 3]; phones store theirs lying, with a rotation beside it."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _pixel_aspect(stream: Any, frame: Any) -> float:
    """Width of a pixel over its height, as seen upright."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return 1 / aspect if frame.rotation % 180 else aspect


def _plain(error: Exception, path: Path) -> str:
    """An error's text without the path, which the quarantine row has in a field of its own."""
    return str(getattr(error, "strerror", None) or error).replace(str(path), path.name)
