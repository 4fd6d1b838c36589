"""Complete pipeline configs by name; a variant calls one and replaces fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wan_core.config import (
    EncodeConfig,
    EvaluateConfig,
    PipelineConfig,
    SampleConfig,
    ShardConfig,
    Size,
    TrainConfig,
    check,
)  # fmt: skip

PROMPTS = (
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
    "A slow pan over a mountain lake at sunrise, mist drifting above the water.",
)


def wan_demo() -> PipelineConfig:
    """Moving coloured shapes, minutes on two CPU cores."""
    from wan_core.demo import held_out_prompts

    return PipelineConfig(
        name="demo",
        encode=EncodeConfig(
            sizes=(Size(48, 48), Size(48, 64)), max_frames=9, vae_dtype="float32", text_dtype="float32",
            clips_per_part=32,
        ),
        shard=ShardConfig(max_samples=100, val_share=0.06),
        train=TrainConfig(recipe="wan_demo", mode="pretrain"),
        sample=SampleConfig(
            prompts=held_out_prompts() * 3, negative_prompt="", size=Size(48, 48), num_frames=9, num_steps=20,
            guidance_scale=2.5, shift=3.0, dtype="float32", batch_tokens=4096,
        ),
        evaluate=EvaluateConfig(checker="shapes"),
    )  # fmt: skip


def wan_1_3b() -> PipelineConfig:
    """T2V-1.3B at 480p, finetuned."""
    return PipelineConfig(
        name="wan-1-3b",
        encode=EncodeConfig(sizes=(Size(480, 832), Size(832, 480)), max_frames=81),
        train=TrainConfig(recipe="wan_1_3b", mode="finetune"),
        sample=SampleConfig(prompts=PROMPTS, shift=3.0),
    )


def wan_14b() -> PipelineConfig:
    """T2V-14B at 720p, finetuned."""
    base = wan_1_3b()
    return replace(
        base,
        name="wan-14b",
        encode=EncodeConfig(sizes=(Size(720, 1280), Size(1280, 720)), max_frames=81),
        train=TrainConfig(recipe="wan_14b", mode="finetune"),
        sample=SampleConfig(prompts=PROMPTS, size=Size(720, 1280), shift=5.0),
    )


def wan_i2v_14b() -> PipelineConfig:
    """I2V-14B at 480p, finetuned; samples need `sample.images`, the first frame for each prompt."""
    base = wan_1_3b()
    return replace(base, name="wan-i2v-14b", train=TrainConfig(recipe="wan_i2v_14b", mode="finetune"))


PRESETS: dict[str, Callable[[], PipelineConfig]] = {
    "wan_demo": wan_demo, "wan_1_3b": wan_1_3b, "wan_14b": wan_14b, "wan_i2v_14b": wan_i2v_14b,
}  # fmt: skip


def get(recipe: str) -> PipelineConfig:
    """The preset of this name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    check(recipe in PRESETS, f"recipe {recipe!r} does not exist; choose one of {', '.join(PRESETS)}")
    return PRESETS[recipe]()
