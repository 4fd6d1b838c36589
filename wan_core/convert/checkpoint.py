"""Megatron's distributed checkpoints, read without Megatron: any layout, by parameter name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

from wan_core import checkpoints
from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.mapping import parameter_names, stays_float32


def has_checkpoint(path: Path) -> bool:
    """Whether `iteration_dir` would find one."""
    return (path / "run_config.yaml").is_file() or checkpoints.latest(path) is not None


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
    whole = checkpoints.whole_iterations(path)
    check(len(whole) > 0, f"{path} holds no checkpoint; give the folder of checkpoint.save")
    iteration = whole[-1] if iteration is None else iteration
    check(
        iteration in whole,
        f"{path} has no checkpoint of iteration {iteration}; it has: {', '.join(map(str, whole))}",
    )
    return checkpoints.folder_of(path, iteration)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a checkpoint."""
    model = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["model"]
    return Architecture(
        hidden_size=model["hidden_size"], ffn_hidden_size=model["ffn_hidden_size"],
        num_attention_heads=model["num_attention_heads"], num_layers=model["num_layers"],
        in_channels=model["in_channels"], out_channels=model["out_channels"], text_dim=model["text_dim"],
        freq_dim=model["freq_dim"], eps=model["layernorm_epsilon"], image_dim=model.get("image_dim", 0),
    )  # fmt: skip


EMA = "optimizer.state.ema."  # prefix of the averages' names


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors of a checkpoint: the model's own, and the optimizer's behind `optimizer.state.<kind>.`."""
    return list(_keys(folder))


def _keys(folder: Path) -> dict[str, str]:
    """torch_dist's names of a checkpoint's tensors, and under which key each one is stored."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    keys = [key for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)]
    if checkpoint_format(folder) == "torch_dist":
        return {key: key for key in keys}
    names = {}
    for key in keys:
        if key.startswith("model."):
            names[without_wrappers(key.removeprefix("model."))] = key
        elif key.startswith("optimizer.state."):
            name, _, kind = key.removeprefix("optimizer.state.").rpartition(".")
            names[f"optimizer.state.{kind}.{without_wrappers(name)}"] = key
    return names


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, whole, on the CPU; the model's in the dtype that was trained."""
    import torch.distributed.checkpoint as dcp  # takes seconds; a cached run needs none of it
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries, keys, dtype = FileSystemReader(folder).read_metadata().state_dict_metadata, _keys(folder), None
    if checkpoint_format(folder) == "fsdp_dtensor":  # which holds master weights in float32
        dtype = _trained_dtype(folder)
    state: dict[str, Tensor] = {}
    for name in sorted(set(names)):
        entry = entries[keys[name]]
        assert isinstance(entry, TensorStorageMetadata), name
        saved = entry.properties.dtype
        own = stays_float32(name) or name.startswith("optimizer.")
        state[keys[name]] = torch.empty(entry.size, dtype=saved if own else dtype or saved)
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name: state[keys[name]] for name in sorted(set(names))}


def read_weights(folder: Path, weights: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """Every model parameter of a checkpoint, whole, on the CPU, in the dtype that was trained, or its float32 average.

    Of a parameter that was frozen, both are the same.

    Raises:
        ValueError: parameters are missing, or the checkpoint holds no averages.
    """
    names, found = parameter_names(read_architecture(folder)), set(tensor_names(folder))
    missing = sorted(names - found)
    check(not missing, f"{folder} lacks {missing[:3]} ({len(missing)} in all); it is not a WAN checkpoint")
    if weights == "model":
        return read_tensors(folder, names)
    chosen = {name: EMA + name if EMA + name in found else name for name in names}
    check(
        any(name.startswith(EMA) for name in chosen.values()),
        f"{folder} holds no averaged weights; train with optimizer.ema_decay, or export weights=model",
    )
    tensors = read_tensors(folder, chosen.values())
    return {name: tensors[source] for name, source in chosen.items()}


def _trained_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's model, but for what stays float32."""
    entry = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["model"]["params_dtype"]
    return getattr(torch, entry["_target_"].removeprefix("torch."))
