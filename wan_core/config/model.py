"""Train, convert, sample, evaluate: a dataset to a model, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from wan_core.config.base import STRICT, Size, check, check_num_frames, place
from wan_core.config.ranges import Count, CountOrZero, Positive, Range, check_ranges
from wan_core.described import described
from wan_core.trainer_keys import check_trainer_key

# Override keys (and key prefixes) that say how long, how often or where to train: free to change when a run resumes.
RESUMABLE_KEYS = (
    "train.train_iters", "validation.", "stability.", "checkpoint.", "logger.", "dist.",
    "ddp.", "profiling.", "dataset.num_workers", "model.tensor_model_parallel_size", "model.sequence_parallel",
    "model.context_parallel_size", "model.cp_comm_type", "model.pipeline_model_parallel_size", "model.recompute_",
    "train.global_batch_size",
)  # fmt: skip


@described
@dataclass(frozen=True)
class TrainConfig:
    """One training run: a recipe, a mode and overrides in the keys of Bridge's ConfigContainer."""

    recipe: str = "wan_1_3b"
    """Name of a file of wan_core/conf."""
    mode: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain starts from random weights, finetune from the model's."""
    overrides: tuple[str, ...] = ()
    """key=value in the trainer's own keys, for example train.train_iters=1000."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for text in self.overrides:
            key, equals, _ = text.partition("=")
            check(
                bool(equals) and bool(key.strip()),
                f"override {text!r} is not key=value; write for example train.train_iters=1000",
            )
            check_trainer_key(key.strip())

    def resumable(self) -> TrainConfig:
        """This config without the overrides that a resumed run may change: its fingerprint names the run folder."""
        kept = tuple(text for text in self.overrides if not text.partition("=")[0].startswith(RESUMABLE_KEYS))
        return replace(self, overrides=kept)


@described
@dataclass(frozen=True)
class ConvertConfig:
    """Checkpoint to Diffusers folder."""

    iteration: CountOrZero | None = None
    """Checkpoint to convert; empty: the latest."""
    weights: Literal["model", "ema"] = "model"
    """ema: their moving averages, of a run with optimizer.ema_decay."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the written weights."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)


NEGATIVE_PROMPT = (  # the default of Wan2.1's own generate.py; the model was trained to be steered away from it
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@described
@dataclass(frozen=True)
class SampleConfig:
    """Videos from prompts."""

    prompts: tuple[str, ...] = ()
    """One video each."""
    images: tuple[str, ...] = place(())
    """Of an image-to-video model: image files, the first frame of each prompt's video."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What guidance leads away from."""
    size: Size = Size(480, 832)
    """Size of the videos."""
    num_frames: Count = 81
    """Frames of each video, 4n+1."""
    fps: Positive = 16.0
    """Frames per second of the written videos."""
    num_steps: Count = 50
    """Steps of the sampler."""
    guidance_scale: Annotated[float, Range(1)] = 5.0
    """Strength of classifier-free guidance; 1: none."""
    shift: Positive = 5.0
    """Shift of the noise levels: 3 at 480p, 5 at 720p."""
    seed: int = 0
    """Prompt i uses seed + i."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the transformer."""
    batch_tokens: Count = place(1)
    """Prompts are packed into one forward up to this many tokens; at least one prompt."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)
        check_num_frames("num_frames", self.num_frames)


@described
@dataclass(frozen=True)
class EvaluateConfig:
    """Metrics and report over samples."""

    checker: Literal["none", "shapes"] = "none"
    """shapes measures colour, shape and direction of the demo's prompts."""
    __pydantic_config__ = STRICT
