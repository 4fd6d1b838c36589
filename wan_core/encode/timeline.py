"""When the frames of a video are shown, read from its packets without decoding a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Containers round timestamps (WebM to milliseconds): a step may be missed by this share of a frame.
TOLERANCE = Fraction(1, 8)


@dataclass(frozen=True)
class Timeline:
    """Frames in the order in which they are shown."""

    pts: np.ndarray  # int64 [N], ascending, N >= 1
    time_base: Fraction  # seconds of one pts
    step: Fraction  # seconds of a frame, on average
    lasting: Fraction  # seconds of the last frame

    def __len__(self) -> int:
        return len(self.pts)

    def time(self, frame: int) -> Fraction:
        return int(self.pts[frame]) * self.time_base

    def after(self, frame: int) -> Fraction:
        """When a frame ends."""
        return self.time(frame + 1) if frame + 1 < len(self) else self.time(frame) + self.lasting

    def first_from(self, time: Fraction) -> int:
        """The first frame shown at this time or later; N if there is none."""
        return int(np.searchsorted(self.pts, math.ceil((time - self.step * TOLERANCE) / self.time_base), side="left"))

    def num_sampled(self, start: int, end: int, fps: Fraction) -> int:
        """How many frames resampling `start` to `end` (inclusive) gives, see `video.read_video`."""
        origin = self.time(start)
        until = math.floor((self.after(end) + self.step * TOLERANCE - origin) * fps)
        if end == start:
            return max(1, until)
        middle = (self.time(end - 1) + self.time(end)) / 2
        return max(until, math.floor((middle - origin) * fps) + 1)

    def windows(self, start: int, end: int, fps: Fraction, length: int, stride: int) -> list[tuple[int, int]]:
        """Cut `start` to `end` (inclusive) into windows of `length` frames at `fps`, `stride` apart.

        The last ones are shorter: whoever asks decides what is too short.
        """
        found: list[tuple[int, int]] = []
        first = start
        while first <= end:
            last = min(end, self.first_from(self.time(first) + length / fps) - 1)
            found.append((first, max(first, last)))
            if last >= end:
                break
            following = self.first_from(self.time(start) + len(found) * stride / fps)
            first = max(first + 1, following)
        return found
