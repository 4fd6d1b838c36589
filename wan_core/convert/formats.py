"""One checkpoint in two formats: Megatron-FSDP reads and writes `fsdp_dtensor`, every other layout `torch_dist`.

Both are torch's distributed checkpoints: files of tensors, and a `.metadata` that says what is called how and lies
where. So a run goes on in the other format from a view: a folder with other names for the same bytes, and the few
numbers that the formats keep differently. No tensor is read or copied, whatever the model's size. For a parameter X:

| | torch_dist | fsdp_dtensor |
|---|---|---|
| weight | X | model.X, in float32 |
| master weight, float32 | optimizer.state.param.X | model.X |
| Adam's moments | optimizer.state.exp_avg.X | optimizer.state.X.exp_avg |
| Adam's steps | once for each group of parameters | optimizer.state.X.step, or optimizer.param_to_group_meta.X.step |

There, X begins with a `module.` for each of megatron's wrappers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from wan_core.config import check
from wan_core.convert.checkpoint import checkpoint_format, has_checkpoint, iteration_dir, without_wrappers

MOMENTS = ("exp_avg", "exp_avg_sq", "ema")
WRAPPERS = tuple("module." * count for count in range(4))
COMMON = "common_state/shard_0_1"  # torch_dist's numbers that are not tensors
OWN = (".metadata", "metadata.json", "run_config.yaml")  # files that a view has instead of the checkpoint's


@contextlib.contextmanager
def loadable(checkpoint: Any) -> Iterator[None]:
    """In this context, the folders that Bridge's `checkpoint` section loads are in its own format.

    A view has no random state, so Bridge is told not to look for one: noise follows from each sample's own seed.
    """
    load, wanted = checkpoint.load, checkpoint.ckpt_format
    with (
        readable(load, wanted) as checkpoint.load,
        readable(checkpoint.pretrained_checkpoint, wanted) as checkpoint.pretrained_checkpoint,
    ):
        checkpoint.load_rng = checkpoint.load_rng and checkpoint.load == load
        yield


@contextlib.contextmanager
def readable(load: str | None, wanted: str) -> Iterator[str | None]:
    """A `checkpoint.load` in the wanted format: itself, or a view that lives as long as this context.

    Args:
        load: a folder of checkpoints, of one iteration, or without any.
    """
    if load is None or not has_checkpoint(Path(load)) or checkpoint_format(iteration_dir(Path(load))) == wanted:
        yield load
        return
    root = Path(load).absolute()
    folder = iteration_dir(root)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        view = Path(name) / folder.name
        write_view(folder, view, wanted)
        print(f"{folder} is a {checkpoint_format(folder)} checkpoint; it is read as {wanted}", flush=True)
        if folder == root:
            yield str(view)
            return
        for path in root.iterdir():
            if not path.name.startswith("iter_"):
                (view.parent / path.name).symlink_to(path)
        yield name


def write_view(folder: Path, view: Path, wanted: str) -> None:
    """Make `view` a checkpoint of the wanted format over the files of `folder`, which is one of the other format."""
    view.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in OWN:
            (view / path.name).symlink_to(path)
    config = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))
    config["checkpoint"] |= {"ckpt_format": wanted, "save_rng": False}
    (view / "run_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    metadata = FileSystemReader(folder).read_metadata()
    if wanted == "torch_dist":
        view_metadata = _renamed(metadata, _torch_dist_names(metadata.state_dict_metadata), folder)
        (view / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        torch.save(_common_state(folder, metadata), view / "common.pt")  # megatron looks for it there, too
    else:
        names = _fsdp_names(metadata.state_dict_metadata)
        view_metadata = _renamed(metadata, names, folder)
        dcp.save(_fsdp_numbers(folder, names), storage_writer=FileSystemWriter(view / "numbers"), no_dist=True)
        numbers = FileSystemReader(view / "numbers").read_metadata()
        numbers = _renamed(numbers, {key: [key] for key in numbers.state_dict_metadata}, view / "numbers")
        view_metadata.state_dict_metadata |= numbers.state_dict_metadata
        view_metadata.storage_data |= numbers.storage_data
    with (view / ".metadata").open("wb") as file:
        pickle.dump(view_metadata, file)


def _torch_dist_names(keys: Iterable[str]) -> dict[str, list[str]]:
    """fsdp_dtensor's tensors -> torch_dist's names for them."""
    names = {}
    for key in keys:
        if key.startswith("model."):
            name = without_wrappers(key.removeprefix("model."))
            names[key] = [name, f"optimizer.state.param.{name}"]
        elif match := re.fullmatch(rf"optimizer\.state\.(.+)\.({'|'.join(MOMENTS)})", key):
            names[key] = [f"optimizer.state.{match[2]}.{without_wrappers(match[1])}"]
    return names


def _fsdp_names(keys: Iterable[str]) -> dict[str, list[str]]:
    """torch_dist's tensors -> fsdp_dtensor's names for them."""
    names: dict[str, list[str]] = {}
    keys = set(keys)
    for key in keys:
        match = re.fullmatch(rf"optimizer\.state\.(param|{'|'.join(MOMENTS)})\.(.+)", key)
        if match is None and f"optimizer.state.param.{key}" not in keys and "/" not in key:  # without optimizer
            names[key] = [f"model.{wrappers}{key}" for wrappers in WRAPPERS]
        elif match and match[1] == "param":
            names[key] = [f"model.{wrappers}{match[2]}" for wrappers in WRAPPERS]
        elif match:
            names[key] = [f"optimizer.state.{wrappers}{match[2]}.{match[1]}" for wrappers in WRAPPERS]
    return names


def _common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """torch_dist's numbers, from an fsdp_dtensor checkpoint."""
    meta, scheduler, steps = "optimizer.param_to_group_meta.", "opt_param_scheduler.", r"optimizer\.state\.(.+)\.step"
    keys = metadata.state_dict_metadata
    wanted = [key for key in keys if key.startswith((meta, scheduler)) or re.fullmatch(steps, key)]
    state = {key: torch.empty(()) if re.fullmatch(steps, key) else None for key in wanted}
    found = _read(folder, {"checkpoint_version": None, "iteration": None, **state})
    of: dict[str, dict[str, Any]] = {}  # parameter -> its group's values
    for key in wanted:
        if key.startswith(meta):
            parameter, _, field = key.removeprefix(meta).rpartition(".")
            of.setdefault(parameter, {})[field] = found[key]
    for key in wanted:
        if match := re.fullmatch(steps, key):
            of[match[1]]["step"] = float(found[key])
    groups: list[dict[str, Any]] = []
    for group in of.values():
        if group not in groups:
            groups.append(group)
    return {
        "checkpoint_version": found["checkpoint_version"], "iteration": found["iteration"],
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"},
        "opt_param_scheduler": {k.removeprefix(scheduler): found[k] for k in wanted if k.startswith(scheduler)},
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False, "chained_optim_avoid_prefix": True,
        },
    }  # fmt: skip


def _fsdp_numbers(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """fsdp_dtensor's numbers, from a torch_dist checkpoint; groups' other values are those of the run that goes on.

    Raises:
        ValueError: the optimizer was saved so that only its own layout can read it.
    """
    common = _read(folder, {COMMON: io.BytesIO()})[COMMON][0]
    numbers = {key: common[key] for key in ("checkpoint_version", "iteration")}
    numbers |= {f"opt_param_scheduler.{key}": value for key, value in common.get("opt_param_scheduler", {}).items()}
    if "optimizer" not in common:
        return numbers
    kind = common["optimizer"]["param_state_sharding_type"]
    check(
        kind == "fully_reshardable",
        f"{folder} holds its optimizer as {kind}, which only fits the layout that saved it; save a checkpoint with "
        "checkpoint.dist_ckpt_optim_fully_reshardable=true, or start from its weights alone (checkpoint.finetune=true)",
    )
    (step,) = {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]}
    for moments in names.values():
        for moment in moments:
            if moment.endswith(f".{MOMENTS[0]}"):
                parameter = moment.removeprefix("optimizer.state.").removesuffix(f".{MOMENTS[0]}")
                numbers[f"optimizer.state.{parameter}.step"] = torch.tensor(float(step))
                numbers[f"optimizer.param_to_group_meta.{parameter}.step"] = step
    return numbers


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Entries of a checkpoint; tensors are filled, other values replaced."""
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def _renamed(metadata: Metadata, names: Mapping[str, Sequence[str]], folder: Path) -> Metadata:
    """Metadata of the named tensors, each under all of its new names, for a reader of any folder."""
    storage: dict[Any, Any] = {}
    for index, place in metadata.storage_data.items():
        place = dataclasses.replace(place, relative_path=str(folder / place.relative_path))  # an absolute path wins
        storage |= {dataclasses.replace(index, fqn=name): place for name in names.get(index.fqn, ())}
    entries = {name: metadata.state_dict_metadata[key] for key, new in names.items() for name in new}
    return Metadata(state_dict_metadata=entries, storage_data=storage)
