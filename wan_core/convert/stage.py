"""The convert stage: a training run's checkpoint becomes a complete Diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import ConvertConfig, check
from wan_core.convert.adapters import holds_adapters, merged_weights
from wan_core.convert.checkpoint import EMA, iteration_dir, read_architecture, read_weights
from wan_core.convert.mapping import from_diffusers, to_diffusers
from wan_core.convert.weights import DiffusersWeights, save_transformer
from wan_core.digests import IMAGE_PARTS, encoder_identity
from wan_core.output import writing
from wan_core.records import ConvertRecord, TrainRecord, find_record, fingerprint

PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")  # taken from the reference folder as they are


def stage_fingerprint(config: ConvertConfig, trained: TrainRecord, model: Path) -> str:
    return fingerprint("convert", config, trained=trained.fingerprint, encoder=encoder_identity(model))


def run(config: ConvertConfig, trained: TrainRecord, model: Path, output_dir: Path) -> ConvertRecord:
    """Export a run's checkpoint; everything but the transformer comes from the Diffusers folder `model`.

    Raises:
        ValueError: no such checkpoint, or `model` is not a whole Diffusers folder.
    """
    wanted = stage_fingerprint(config, trained, model)
    if found := find_record(ConvertRecord, output_dir, wanted):
        return found
    with writing("convert", output_dir, config, wanted) as output:
        folder = iteration_dir(trained.path / "checkpoints", config.iteration)
        num_tensors = export(folder, model, output.path, getattr(torch, config.dtype), config.weights)
        iteration = int(folder.name.removeprefix("iter_"))
        return output.finish(ConvertRecord, iteration=iteration, num_tensors=num_tensors)


def export(
    checkpoint: Path, model: Path, output_dir: Path, dtype: torch.dtype | None = None,
    weights: Literal["model", "ema"] = "model",
) -> int:  # fmt: skip
    """Write a Diffusers folder from a checkpoint's iteration folder; adapters are merged into `model`'s weights.

    Args:
        dtype: None keeps every tensor's own.
        weights: the model's, or their moving averages.

    Returns:
        The number of transformer tensors.
    """
    architecture = read_architecture(checkpoint)
    check_reference(model, architecture)
    if holds_adapters(checkpoint):
        base = dict(from_diffusers(DiffusersWeights(model), architecture))
        state = merged_weights(checkpoint, base, architecture, EMA if weights == "ema" else "")
    else:
        state = to_diffusers(read_weights(checkpoint, weights), architecture)
    return write_folder(state, architecture, model, output_dir, dtype)


def parts_of(architecture: Architecture) -> tuple[str, ...]:
    """What a Diffusers folder holds beside the transformer."""
    return (*PARTS, *(IMAGE_PARTS if architecture.image_dim else ()))


def check_reference(model: Path, architecture: Architecture) -> None:
    """Raise ValueError unless `model` has every part that an export takes over."""
    missing = [name for name in (*parts_of(architecture), "model_index.json") if not (model / name).exists()]
    pipeline = "WanImageToVideoPipeline" if architecture.image_dim else "WanPipeline"
    check(
        not missing,
        f"model folder {model} has no {', '.join(missing)}; give a folder that {pipeline}.from_pretrained loads",
    )


def write_folder(
    weights: dict[str, Tensor], architecture: Architecture, model: Path, output_dir: Path, dtype: torch.dtype | None
) -> int:
    """Assemble a Diffusers folder: these transformer weights, the other parts of `model`."""
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_transformer(weights, architecture, output_dir / "transformer")
    for name in parts_of(architecture):
        shutil.copytree(model / name, output_dir / name, copy_function=_link_or_copy)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["diffusers", "WanTransformer3DModel"]
    (output_dir / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(weights)


def _link_or_copy(source: str, target: str) -> str:
    """Hard-link a part's file (a text encoder has 11 GB), or copy it to another file system."""
    if os.stat(source).st_dev == os.stat(os.path.dirname(target)).st_dev:
        os.link(os.path.realpath(source), target)
        return target
    return shutil.copy2(source, target)
