"""Frames of a video file by number and by time, through PyAV; what cannot be decoded becomes a `ClipError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from wan_core.encode.timeline import TOLERANCE, Timeline


class ClipError(ValueError):
    """A clip that cannot be used; the sentence is the reason that its quarantine row shows.

    Args:
        retry: the cause lies around the clip, not in it (its file cannot be read, memory ran out): the next run tries
            again. Otherwise it is final for these bytes and this caption.
    """

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


@contextmanager
def refused(what: str, path: Path) -> Iterator[None]:
    """What a library raises at a file becomes a `ClipError`: FFmpeg and Pillow meet odd ones with errors of any type.

    So does a fault of our own, but that would be every clip's, and ends the run by `max_quarantine_share`.
    """
    try:
        yield
    except FFmpegError as error:  # before OSError, which some of them are
        raise ClipError(f"{what}: {plain(error, path)}") from error
    except (ClipError, OSError, MemoryError, AssertionError):
        raise
    except Exception as error:
        raise ClipError(f"{what}: {type(error).__name__}: {plain(error, path)}") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; cover art is none."""
    if path.stat().st_size == 0:
        raise ClipError("empty file: 0 bytes")
    with refused("not a readable video", path):
        container = av.open(str(path))
    with container, refused("damaged video", path):
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise ClipError("not a readable video: it holds no video stream")
        if streams[0].codec_context is None:
            raise ClipError("not a readable video: FFmpeg has no decoder for its codec")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def read_timeline(path: Path) -> Timeline:
    """When each frame of a file is shown. The latest files are remembered: clips cut from one follow one another.

    Raises:
        ClipError: not a video, or truncated.
    """
    status = path.stat()
    return _timeline(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _timeline(path: Path, state: tuple[int, ...]) -> Timeline:
    with opened(path) as (container, stream):
        if stream.codec_context.name == "vp8":  # some of its packets hold no frame to be shown
            shown = [(frame.pts, frame.duration or 0) for frame in decoded(container, stream)]
        else:
            packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            shown = [(packet.pts, packet.duration or 0) for packet in packets]
        if not shown or any(pts is None for pts, _ in shown):
            raise ClipError("damaged video: it holds no frame" if not shown else "damaged video: no timestamps")
        shown.sort()
        pts = np.array([pts for pts, _ in shown], np.int64)
        step, base = frame_seconds(stream), Fraction(stream.time_base)
        timeline = Timeline(pts, base, step, shown[-1][1] * base if shown[-1][1] else step)
        _check_whole(container, stream, timeline.after(len(timeline) - 1))
        return timeline


def frame_seconds(stream: Any) -> Fraction:
    return 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)


def _check_whole(container: Any, stream: Any, end: Fraction) -> None:
    """Raise `ClipError` unless the frames reach as far as the header promises."""
    promised = Fraction(0)
    if stream.duration is not None:
        promised = ((stream.start_time or 0) + stream.duration) * stream.time_base
    elif container.duration is not None and len(container.streams) == 1:  # Matroska: when the last frame ends
        promised = Fraction(container.duration, av.time_base)
    if promised - end > 2 * frame_seconds(stream):
        raise ClipError(f"truncated: {float(end):.2f} s of {float(promised):.2f} s can be decoded")


def decoded(container: Any, stream: Any, since: int | None = None) -> Iterator[Any]:
    """Frames in display order, those before the pts `since` left out; an error if the file ends too early."""
    end = Fraction(0)
    count = 0
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ClipError(f"damaged video: frame {count} has no timestamp")
        if since is not None and frame.pts < since:
            continue
        if frame.is_corrupt:
            raise ClipError(f"damaged video: frame {count} is corrupt")
        lasting = frame.duration * frame.time_base if frame.duration else frame_seconds(stream)
        end = max(end, frame.pts * frame.time_base + lasting)
        count += 1
        yield frame
    if count == 0:
        raise ClipError("damaged video: no frame could be decoded")
    _check_whole(container, stream, end)


def decoded_from(container: Any, stream: Any, times: Timeline | None, start: int) -> Iterator[Any]:
    """Frames from number `start` on, found by a seek to the keyframe before it."""
    if times is None or start == 0:
        yield from decoded(container, stream)
        return
    if start >= len(times):
        raise ClipError(f"too short: the file has {len(times)} frames, the clip starts at {start}")
    since = int(times.pts[start])
    container.seek(since, stream=stream, backward=True)
    frames = decoded(container, stream, since)
    first = next(frames)
    if first.pts != since:  # the container's index leads behind the frame: decode all of what lies before it
        container.seek(min(0, int(times.pts[0])), stream=stream, backward=True)
        frames = decoded(container, stream, since)
        first = next(frames)
        if first.pts != since:
            raise ClipError(f"damaged video: frame {start} cannot be found")
    yield first
    yield from frames


def resampled(frames: Iterator[Any], stream: Any, fps: Fraction, start: int, end: int | None) -> Iterator[Any]:
    """For each k the frame nearest to the first frame's time + k / fps, as long as the clip lasts.

    Args:
        frames: from number `start` on.
    """
    previous, origin, k, number = None, Fraction(0), 0, start - 1
    for number, frame in enumerate(frames, start):
        time = frame.pts * frame.time_base
        if previous is None:
            origin = time
        else:
            before = previous.pts * previous.time_base
            while origin + k / fps <= (before + time) / 2:  # a tie goes to the earlier frame
                yield previous
                k += 1
        previous = frame
        if number == end:
            break
    # Some meta files give the number of frames as the end: one frame beyond the last is forgiven.
    if previous is None or (end is not None and number + 1 < end):
        raise ClipError(f"too short: the file has {number + 1} frames, the clip asks for {start} to {end}")
    lasting = previous.duration * previous.time_base if previous.duration else frame_seconds(stream)
    finish = previous.pts * previous.time_base + lasting
    while k == 0 or origin + (k + 1) / fps <= finish + frame_seconds(stream) * TOLERANCE:
        yield previous
        k += 1


def plain(error: Exception, path: Path) -> str:
    """An error's text without the path, which the quarantine row has in a field of its own."""
    return str(getattr(error, "strerror", None) or error).replace(str(path), path.name)


def unread(error: OSError) -> ClipError:
    return ClipError(f"cannot be read: {error.strerror or error}", retry=True)


def unreadable(path: Path) -> ClipError | None:
    """Why a file's bytes cannot be had, or None if they can."""
    try:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        return unread(error)
    return None
