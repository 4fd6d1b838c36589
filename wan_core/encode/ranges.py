"""Long videos to clips: cut at scenes, then into windows. Both become frame ranges before anything is encoded.

A clip (a file, or the range of it that a meta file names) is cut at the scene cuts inside it; each piece is cut into
windows of `window_frames`, `window_stride` apart. A piece's last window is shorter, and left out below `min_frames`.
Every range keeps the clip's caption. Ranges are remembered by content and settings, so planning again opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path

from wan_core.config import EncodeConfig
from wan_core.data.clips import IMAGE_SUFFIXES, Clip, Quarantined, Scan, in_order
from wan_core.data.folder import ChangedError, Folder
from wan_core.encode.decode import ClipError, read_timeline
from wan_core.encode.video import read_small
from wan_core.memory import recall, remember
from wan_core.records import digest

SCENE_HEIGHT = 144  # pixels that the detectors see; PySceneDetect scales down as far
BATCH = 256  # files looked at before what was found is remembered

type Ranges = list[tuple[int, int]]


def cut(config: EncodeConfig, folder: Folder, scanned: Scan) -> Scan:
    """The scan with its videos cut into ranges; a file that cannot be looked at is quarantined.

    Raises:
        ValueError: scenes are asked for, and PySceneDetect is not installed.
    """
    if not config.window_frames and config.scene_detector == "none":
        return scanned
    if config.scene_detector != "none":
        _detectors()
    images = [clip for clip in scanned.clips if clip.path.lower().endswith(IMAGE_SUFFIXES)]
    videos = [clip for clip in scanned.clips if not clip.path.lower().endswith(IMAGE_SUFFIXES)]
    clips, quarantined = {clip.key: clip for clip in images}, list(scanned.quarantined)
    for clip, found in _ranges(config, folder, videos):
        if isinstance(found, ClipError):
            quarantined.append(Quarantined(clip.path, str(found)))
            continue
        for start, end in found:
            piece = Clip(clip.path, clip.digest, clip.caption, start, end)
            clips.setdefault(piece.key, piece)  # overlapping rows of one caption meet in the same window
    return Scan(in_order(clips.values()), tuple(sorted(quarantined, key=lambda bad: (bad.path, bad.reason))))


def _ranges(config: EncodeConfig, folder: Folder, clips: list[Clip]) -> Iterator[tuple[Clip, Ranges | ClipError]]:
    settings = digest([
        config.fps, config.min_frames, config.mode, config.window_frames, config.window_stride, config.scene_detector,
        config.scene_threshold,
    ])[:16]  # fmt: skip

    def key(clip: Clip) -> str:
        return f"ranges {settings} {clip.digest} {clip.start_frame} {clip.end_frame}"

    files = [list(of_file) for _, of_file in groupby(clips, key=lambda clip: clip.path)]
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(files), BATCH):
            some = files[i : i + BATCH]
            known = recall([key(clip) for of_file in some for clip in of_file])
            unknown = [of_file for of_file in some if any(key(clip) not in known for clip in of_file)]
            found = dict(zip(map(id, unknown), pool.map(lambda of: _look(config, folder, of), unknown), strict=True))
            remember(
                (key(clip), json.dumps(ranges))
                for of_file in unknown
                for clip, ranges in zip(of_file, found[id(of_file)], strict=True)
                if not isinstance(ranges, ClipError)
            )
            for of_file in some:
                ranges = found.get(id(of_file)) or [json.loads(known[key(clip)]) for clip in of_file]
                yield from zip(of_file, ranges, strict=True)


def _look(config: EncodeConfig, folder: Folder, clips: list[Clip]) -> list[Ranges | ClipError]:
    """The ranges of each clip of one file."""
    try:
        with folder.local(clips[0].path, clips[0].digest) as path:
            timeline = read_timeline(path)
            cuts = scene_cuts(path, config) if config.scene_detector != "none" else []
    except (ClipError, FileNotFoundError, PermissionError, ChangedError) as error:
        return [error if isinstance(error, ClipError) else ClipError(f"cannot be read: {error}")] * len(clips)
    found: list[Ranges | ClipError] = []
    fps, length = Fraction(config.fps), config.window_frames
    for clip in clips:
        start = clip.start_frame
        end = len(timeline) - 1 if clip.end_frame is None else min(clip.end_frame, len(timeline) - 1)
        ranges: Ranges = []
        # Some meta files give the number of frames as the end: one frame beyond the last is forgiven.
        if start <= end and (clip.end_frame is None or clip.end_frame <= len(timeline)):
            for first, following in pairwise([start, *(n for n in cuts if start < n <= end), end + 1]):
                piece = (first, following - 1)
                ranges += timeline.windows(*piece, fps, length, config.window_stride or length) if length else [piece]
        least = config.min_frames if config.mode == "video" else 1
        kept = [pair for pair in ranges if timeline.num_sampled(*pair, fps) >= least]
        asked = f"the file has {len(timeline)} frames, no range of frames {start} to {clip.end_frame or 'its end'} has"
        found.append(kept or ClipError(f"too short: {asked} min_frames={least} at {config.fps:g} fps"))
    return found


def scene_cuts(path: Path, config: EncodeConfig) -> list[int]:
    """Numbers of the frames at which a new scene begins, by PySceneDetect's detectors on small pictures.

    Raises:
        ClipError: not a video, or damaged.
    """
    content, adaptive, timecode = _detectors()
    shortest = config.min_frames / config.fps  # seconds
    if config.scene_detector == "content":
        detector = content(threshold=config.scene_threshold or 27.0, min_scene_len=shortest)
    else:
        detector = adaptive(adaptive_threshold=config.scene_threshold or 3.0, min_scene_len=shortest)
    found, position = [], None
    for number, (picture, rate) in enumerate(read_small(path, SCENE_HEIGHT)):
        position = timecode(number, fps=rate)
        found += detector.process_frame(position, picture)
    if position is not None:
        found += detector.post_process(position)
    return sorted({scene.frame_num for scene in found})


def _detectors() -> tuple[type, type, type]:
    try:
        from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
    except ImportError as error:
        raise ValueError(
            f"encode.scene_detector needs PySceneDetect, which is not installed ({error}); "
            "install the extra: uv sync --extra scenes"
        ) from error
    return ContentDetector, AdaptiveDetector, FrameTimecode
