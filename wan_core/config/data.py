"""Encode, shard, index: raw clips to a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wan_core.config.base import STRICT, Size, check, check_num_frames, num_tokens, place
from wan_core.config.model import NEGATIVE_PROMPT
from wan_core.config.ranges import Count, CountOrZero, Positive, PositiveOrZero, Share, check_ranges
from wan_core.described import described


@described
@dataclass(frozen=True)
class EncodeConfig:
    """Raw clips to latents and text embeddings."""

    sizes: tuple[Size, ...] = (Size(480, 832),)
    """Sizes of the encoded clips; a clip goes to the one of nearest aspect ratio."""
    tokens_per_sample: CountOrZero = 0
    """Above 0: buckets of at most so many tokens, of several lengths and shapes, instead of `sizes` alone."""
    bucket_frames: tuple[Count, ...] = (17, 33, 49, 81)
    """Lengths of buckets; their areas are those of `sizes`."""
    max_frames: Count = 81
    """Frames of a clip at most, 4n+1; the rest is cut off."""
    min_frames: Count = 5
    """Clips with fewer frames go to the quarantine."""
    fps: Positive = 16.0
    """Frames per second that clips are resampled to."""
    mode: Literal["video", "frames"] = "video"
    """video, or frames: one latent per clip, from its first frame."""
    center_crop: bool = True
    """Cut to the size's aspect ratio; False stretches."""
    window_frames: CountOrZero = 0
    """Above 0: long clips are cut into windows of so many frames (at `fps`)."""
    window_stride: CountOrZero = 0
    """Frames from one window's start to the next's; 0: `window_frames`."""
    scene_detector: Literal["none", "content", "adaptive"] = "none"
    """PySceneDetect's detector; clips end at its cuts."""
    scene_threshold: PositiveOrZero = 0.0
    """Of the scene detector; 0: its own."""
    vae_dtype: Literal["float32", "float16x3", "float16", "bfloat16"] = "float32"
    """What the VAE's products are of."""
    text_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the text encoder. Never float16: UMT5 overflows to zeros."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Encoded beside the empty caption: training may put it in the place of dropped captions."""
    clips_per_part: Count = place(64)
    """Clips that one task encodes; a failure costs at most this much work. Small clips share forwards within a part."""
    decode_threads: Count = place(4)
    """Of one worker; so many decoded clips wait in memory, in 16 bits on a GPU also up to 16 small ones per shape."""
    max_quarantine_share: Share = place(0.2)
    """The stage fails when a larger share of the clips cannot be used."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)
        check(len(self.sizes) > 0, "sizes=() is empty; give at least one HEIGHTxWIDTH, for example 480x832")
        check_num_frames("max_frames", self.max_frames)
        check_num_frames("min_frames", self.min_frames)
        check(
            self.min_frames <= self.max_frames,
            f"min_frames={self.min_frames} exceeds max_frames={self.max_frames}; lower min_frames",
        )
        self._check_buckets()
        self._check_windows()

    def _check_buckets(self) -> None:
        check(len(self.bucket_frames) > 0, "bucket_frames=() is empty; give lengths of 4n+1 frames, for example 17,49")
        for num_frames in self.bucket_frames:
            check_num_frames("bucket_frames", num_frames)
        smallest = min(self.sizes, key=lambda size: size.height * size.width)
        least = num_tokens(1 if self.mode == "frames" else min(self.bucket_frames), smallest)
        check(
            self.tokens_per_sample == 0 or self.tokens_per_sample >= least,
            f"tokens_per_sample={self.tokens_per_sample} is below {least}, the tokens of the smallest bucket "
            f"({smallest}); raise it, add a smaller size or shorter bucket_frames, or set 0 for no buckets",
        )

    def _check_windows(self) -> None:
        if self.window_frames:
            check_num_frames("window_frames", self.window_frames)
            check(
                self.min_frames <= self.window_frames <= self.max_frames,
                f"window_frames={self.window_frames} is not between min_frames={self.min_frames} and "
                f"max_frames={self.max_frames}; choose {self.max_frames}, or 0 for whole clips",
            )
        check(
            self.window_stride == 0 or self.window_frames > 0,
            f"window_stride={self.window_stride} needs window_frames > 0; set window_frames, or window_stride=0",
        )
        check(
            self.scene_threshold == 0 or self.scene_detector != "none",
            f"scene_threshold={self.scene_threshold} needs scene_detector=content (its own is 27) or adaptive (3); "
            "choose a detector, or scene_threshold=0",
        )


@described
@dataclass(frozen=True)
class ShardConfig:
    """Parts to shuffled WebDataset shards, split by clip digest."""

    max_samples: Count = 1000
    """Samples of one shard at most."""
    max_bytes: Count = 1 << 30
    """Bytes of one shard at most."""
    val_share: Share = 0.02
    """Share of the clips that validation keeps; the split follows a clip's digest."""
    test_share: Share = 0.0
    """Share of the clips that nothing but a test may see."""
    seed: int = 0
    """Seed of the samples' order in the shards."""
    workers: Count = place(4)
    """Shards that are written at a time."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)
        check(
            self.val_share + self.test_share < 1,
            f"val_share={self.val_share} and test_share={self.test_share} leave no training data; "
            "choose shares whose sum is below 1",
        )


@described
@dataclass(frozen=True)
class IndexConfig:
    """Energon metadata."""

    workers: Count = place(2)
    """Processes that read the shards."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)
