"""Megatron's distributed checkpoints, read without Megatron: any layout, by parameter name."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.mapping import parameter_names


def iteration_dir(path: Path, iteration: int | None = None) -> Path:
    """The folder of one checkpoint: `path` itself, or below it the given or the latest iteration.

    Raises:
        ValueError: there is no such checkpoint; names those that exist.
    """
    if (path / "run_config.yaml").is_file() and iteration is None:
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
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
    """Every model parameter of a checkpoint, whole, on the CPU, in the dtype that it was saved in."""
    import torch.distributed.checkpoint as dcp  # takes seconds; a cached run needs none of it
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    names = parameter_names(read_architecture(folder))
    missing = sorted(names - entries.keys())
    check(not missing, f"{folder} lacks {missing[:3]} ({len(missing)} in all); it is not a WAN checkpoint")
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        entry = entries[name]
        assert isinstance(entry, TensorStorageMetadata), name
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state
