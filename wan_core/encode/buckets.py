"""Buckets: the few shapes that the clips of a dataset take, each of at most `tokens_per_sample` tokens.

A bucket is a length of `bucket_frames` from `min_frames` to `max_frames`, an area of `sizes` and one of nine aspect
ratios, in multiples of 16 pixels.
A clip's bucket follows from its own length and size alone, so it is the same in every run and beside any other clips:

    1. aspect ratio: the nearest of the nine (of the logarithms);
    2. of the buckets with that ratio that need no more frames and no more pixels than the clip has, the one of most
       tokens; of equal ones the longest;
    3. where every bucket has more pixels than the clip, those of the smallest area are taken: it is scaled up to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from wan_core.config import SIZE_MULTIPLE, EncodeConfig, Size, check, num_tokens

ASPECTS = ((9, 21), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (21, 9))  # width, height


@dataclass(frozen=True)
class Bucket:
    frames: int
    size: Size
    aspect: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        return num_tokens(self.frames, self.size)


@cache
def buckets(config: EncodeConfig) -> tuple[Bucket, ...]:
    """Every bucket of a config, longest first.

    Raises:
        ValueError: there is none.
    """
    within = [frames for frames in config.bucket_frames if config.min_frames <= frames <= config.max_frames]
    lengths = [1] if config.mode == "frames" else sorted(within, reverse=True)
    areas = sorted({size.height * size.width for size in config.sizes}, reverse=True)
    every = [
        Bucket(frames, size_of(area, aspect), aspect) for frames in lengths for area in areas for aspect in ASPECTS
    ]
    found = tuple(bucket for bucket in every if bucket.num_tokens <= config.tokens_per_sample)
    check(
        len(found) > 0,
        f"bucket_frames={config.bucket_frames} has no length from min_frames={config.min_frames} to "
        f"max_frames={config.max_frames} that fits tokens_per_sample={config.tokens_per_sample}; add a length, for "
        f"example {config.min_frames}, or raise tokens_per_sample",
    )
    return found


def largest_shapes(config: EncodeConfig) -> list[tuple[int, Size]]:
    """Frames at most of each size that clips can have."""
    if config.tokens_per_sample:
        return [(bucket.frames, bucket.size) for bucket in buckets(config)]
    return [(1 if config.mode == "frames" else config.max_frames, size) for size in config.sizes]


def size_of(area: int, aspect: tuple[int, int]) -> Size:
    """The largest size of at most this area in pixels whose aspect ratio is within a tenth of (width, height)."""
    patches, ratio = area // SIZE_MULTIPLE**2, max(aspect) / min(aspect)
    ideal = max(1, math.floor(math.sqrt(patches / ratio)))
    pairs = [(short, max(1, min(round(short * ratio), patches // short))) for short in (ideal, ideal + 1)]

    def badness(pair: tuple[int, int]) -> tuple[bool, int, float]:
        error = abs(math.log(pair[1] / pair[0] / ratio))
        return error > (0.1 if ratio > 1 else 0.0), -pair[0] * pair[1], error  # a square stays one

    short, long = (patch * SIZE_MULTIPLE for patch in min(pairs, key=badness))
    return Size(short, long) if aspect[0] >= aspect[1] else Size(long, short)


def choose_bucket(config: EncodeConfig, frames: int, height: float, width: float) -> Bucket | None:
    """The bucket of a clip, or None if it is shorter than all of them.

    Args:
        frames: that the clip has at the config's frame rate.
        height, width: of the clip upright, in square pixels.
    """
    fitting = [bucket for bucket in buckets(config) if bucket.frames <= frames]
    if not fitting:
        return None

    def distance(bucket: Bucket) -> float:
        return round(abs(math.log(bucket.aspect[0] / bucket.aspect[1]) - math.log(width / height)), 6)

    nearest = min(map(distance, fitting))
    fitting = [bucket for bucket in fitting if distance(bucket) == nearest]
    smaller = [bucket for bucket in fitting if bucket.size.height <= height and bucket.size.width <= width]
    smallest = min(bucket.size.height * bucket.size.width for bucket in fitting)
    return max(
        smaller or [bucket for bucket in fitting if bucket.size.height * bucket.size.width == smallest],
        key=lambda bucket: (bucket.num_tokens, bucket.frames),
    )
