"""Megatron's distributed checkpoints, read without Megatron: any layout, by parameter name."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.mapping import parameter_names, stays_float32

TRACKER = "latest_checkpointed_iteration.txt"


def has_checkpoint(path: Path) -> bool:
    """Whether `iteration_dir` would find one."""
    return (path / "run_config.yaml").is_file() or (path / TRACKER).is_file()


def checkpoint_format(folder: Path) -> str:
    """torch_dist or fsdp_dtensor, of the folder of an iteration."""
    return "torch_dist" if (folder / "metadata.json").is_file() else "fsdp_dtensor"


def without_wrappers(name: str) -> str:
    """A parameter's own name: fsdp_dtensor has a `module.` for each of megatron's wrappers before it."""
    return re.sub(r"^(module\.)+", "", name)


def iteration_dir(path: Path, iteration: int | None = None) -> Path:
    """The folder of one checkpoint: `path` itself, or below it the given or the latest iteration.

    Raises:
        ValueError: there is no such checkpoint; names those that exist.
    """
    if (path / "run_config.yaml").is_file() and iteration is None:
        return path
    tracker = path / TRACKER
    if iteration is None:
        check(
            tracker.is_file(),
            f"{path} holds no checkpoint ({tracker.name} is missing); give the folder of checkpoint.save",
        )
        iteration = int(tracker.read_text())
    folder = path / f"iter_{iteration:07d}"
    found = ", ".join(sorted(p.name.removeprefix("iter_").lstrip("0") or "0" for p in path.glob("iter_*"))) or "none"
    check((folder / "run_config.yaml").is_file(), f"{path} has no checkpoint of iteration {iteration}; it has: {found}")
    return folder


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a checkpoint."""
    model = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["model"]
    return Architecture(
        hidden_size=model["hidden_size"], ffn_hidden_size=model["ffn_hidden_size"],
        num_attention_heads=model["num_attention_heads"], num_layers=model["num_layers"],
        in_channels=model["in_channels"], out_channels=model["out_channels"], text_dim=model["text_dim"],
        freq_dim=model["freq_dim"], eps=model["layernorm_epsilon"],
    )  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every model parameter of a checkpoint, whole, on the CPU, in the dtype that was trained.

    Raises:
        ValueError: parameters are missing.
    """
    import torch.distributed.checkpoint as dcp  # takes seconds; a cached run needs none of it
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    names, keys, dtype = parameter_names(read_architecture(folder)), {name: name for name in entries}, None
    if checkpoint_format(folder) == "fsdp_dtensor":  # which holds master weights in float32
        keys = {without_wrappers(key.removeprefix("model.")): key for key in entries if key.startswith("model.")}
        dtype = _trained_dtype(folder)
    missing = sorted(names - keys.keys())
    check(not missing, f"{folder} lacks {missing[:3]} ({len(missing)} in all); it is not a WAN checkpoint")
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        entry = entries[keys[name]]
        assert isinstance(entry, TensorStorageMetadata), name
        saved = entry.properties.dtype
        state[keys[name]] = torch.empty(entry.size, dtype=saved if stays_float32(name) else dtype or saved)
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name: state[keys[name]] for name in sorted(names)}


def _trained_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's model, but for what stays float32."""
    entry = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["model"]["params_dtype"]
    return getattr(torch, entry["_target_"].removeprefix("torch."))
