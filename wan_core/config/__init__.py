"""What a run computes, as frozen dataclasses that are validated when constructed.

Two kinds of field live here. What is computed enters a stage's fingerprint; where or how often it is computed
(workers, GPUs, part sizes, intervals) does not, and is marked `place()`. A value that cannot work raises
`ValueError` with the value, the rule and the remedy. The text below a field is its description, also in the form of
Prefect's UI and in `wan keys`.
"""

from wan_core.config.base import (
    IMAGE_LENGTH,
    PATCH_SIZE,
    SIZE_MULTIPLE,
    STAGES,
    STORED_TEXTS,
    STRICT,
    TEXT_LENGTH,
    VAE_SPATIAL_STRIDE,
    VAE_TEMPORAL_STRIDE,
    Size,
    Stage,
    check,
    check_num_frames,
    identity,
    num_tokens,
    place,
)  # fmt: skip
from wan_core.config.data import EncodeConfig, IndexConfig, ShardConfig
from wan_core.config.model import (
    NEGATIVE_PROMPT,
    RESUMABLE_KEYS,
    ConvertConfig,
    EvaluateConfig,
    SampleConfig,
    TrainConfig,
)  # fmt: skip
from wan_core.config.pipeline import LaunchConfig, Name, PipelineConfig, RayConfig

__all__ = [
    "IMAGE_LENGTH", "NEGATIVE_PROMPT", "PATCH_SIZE", "RESUMABLE_KEYS", "SIZE_MULTIPLE", "STAGES", "STORED_TEXTS",
    "STRICT", "TEXT_LENGTH", "VAE_SPATIAL_STRIDE", "VAE_TEMPORAL_STRIDE", "ConvertConfig", "EncodeConfig",
    "EvaluateConfig", "IndexConfig", "LaunchConfig", "Name", "PipelineConfig", "RayConfig", "SampleConfig",
    "ShardConfig", "Size", "Stage", "TrainConfig", "check", "check_num_frames", "identity", "num_tokens", "place",
]  # fmt: skip
