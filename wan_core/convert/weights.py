"""Diffusers' transformer weights: read lazily, loaded into a model of any layout, written as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.mapping import from_diffusers

if TYPE_CHECKING:  # writing a folder needs no Megatron
    from wan_core.model.model import WanModel

WEIGHTS = "diffusion_pytorch_model"


class DiffusersWeights(Mapping[str, Tensor]):
    """The tensors of `<model_dir>/transformer/*.safetensors`, each read when it is asked for."""

    def __init__(self, model_dir: Path) -> None:
        folder = model_dir / "transformer"
        files = sorted(folder.glob("*.safetensors"))
        check(
            bool(files), f"{folder} holds no .safetensors file; give the folder that WanPipeline.from_pretrained loads"
        )
        self._where: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


@torch.no_grad()
def load_into(model: WanModel, model_dir: Path) -> None:
    """Copy a Diffusers transformer's weights into this rank's slice of the model, one parameter at a time.

    Raises:
        ValueError: the folder's architecture is not the model's, or tensors are missing.
    """
    found, expected = Architecture.from_diffusers(model_dir), model.config.architecture
    check(
        found == expected, f"{model_dir} holds {found}, but the model is {expected}; give the weights that belong to it"
    )
    weights, parallel = DiffusersWeights(model_dir), model.parallel
    parameters = dict(model.named_parameters())
    for name, weight in from_diffusers(weights, expected, only=parameters.keys()):
        parameter = parameters[name]
        if parallel.tp > 1 and getattr(parameter, "tensor_model_parallel", False):
            weight = weight.chunk(parallel.tp, parameter.partition_dim)[parallel.tp_rank]
        parameter.copy_(weight)


def save_transformer(weights: Mapping[str, Tensor], architecture: Architecture, folder: Path) -> None:
    """Write a Diffusers `transformer` folder: sharded safetensors (10 GB each), index and config.json."""
    from diffusers import WanTransformer3DModel
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True)
    save_torch_state_dict(
        dict(weights), folder, max_shard_size="10GB",
        filename_pattern=WEIGHTS + "{suffix}.safetensors",
    )  # fmt: skip
    with torch.device("meta"):
        config = WanTransformer3DModel(**architecture.to_diffusers()).config
    text = json.dumps(
        {"_class_name": "WanTransformer3DModel", **{k: v for k, v in config.items() if k[0] != "_"}}, indent=2
    )
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
