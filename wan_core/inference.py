"""The transformer outside of training: one process, weights from a Diffusers folder or a Megatron checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from wan_core.architecture import ARCHITECTURES, Architecture
from wan_core.config import check
from wan_core.convert.checkpoint import read_architecture, read_weights
from wan_core.convert.weights import load_into
from wan_core.model.config import WanTransformerConfig
from wan_core.model.model import WanModel
from wan_core.parallel import layout

CUSTOM = ("t2v-custom", "i2v-custom")


def check_task(task: str, architecture: Architecture) -> None:
    """Refuse a task that names another size than the model has; sizes without a name pass as t2v- or i2v-custom.

    Raises:
        ValueError: names both.
    """
    known_tasks = (*ARCHITECTURES, *CUSTOM)
    check(task in known_tasks, f"--task {task} is unknown; choose one of {', '.join(known_tasks)}")
    custom = CUSTOM[architecture.image_dim > 0]
    name = next((name for name, known in ARCHITECTURES.items() if known == architecture), custom)
    check(task == name, f"--task {task}, but the model is {name} ({architecture}); give --task {name}")


def architecture_of(model: Path, checkpoint: Path | None) -> Architecture:
    """Of the checkpoint's iteration folder, or else of the Diffusers folder."""
    return read_architecture(checkpoint) if checkpoint else Architecture.from_diffusers(model)


@contextlib.contextmanager
def loaded_transformer(
    model: Path, checkpoint: Path | None, dtype: torch.dtype, device: torch.device
) -> Iterator[WanModel]:
    """The transformer in evaluation mode, freed at the end; its float32 islands stay float32.

    Args:
        checkpoint: an iteration folder, or None for the Diffusers folder's own weights.
    """
    architecture = architecture_of(model, checkpoint)
    with layout(backend="gloo"), torch.no_grad():
        config = WanTransformerConfig.of(
            architecture, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
            use_cpu_initialization=device.type == "cpu", transformer_impl="local", gradient_accumulation_fusion=False,
        )  # fmt: skip
        transformer = WanModel(config)
        if checkpoint:
            transformer.load_state_dict(read_weights(checkpoint))
        else:
            load_into(transformer, model)
        yield transformer.eval()
        del transformer
