"""The import direction: a Diffusers transformer becomes a Megatron checkpoint that a training run can start from."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.bridge.training.model_load_save import save_megatron_model

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.weights import DiffusersWeights, load_into
from wan_core.model.model import WanModel
from wan_core.model.provider import WanProvider
from wan_core.parallel import layout


def import_checkpoint(model_dir: Path, megatron_path: Path) -> int:
    """Write `<megatron_path>/iter_0000000`, for `checkpoint.pretrained_checkpoint`; tensors keep dtype and bits.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the folder is not a WAN transformer, or `megatron_path` is taken.
    """
    check(not megatron_path.exists(), f"{megatron_path} exists; choose a new folder")
    dtypes = {weight.dtype for weight in DiffusersWeights(model_dir).values()}
    dtype = torch.float32 if torch.float32 in dtypes else torch.bfloat16
    provider = WanProvider.of_architecture(
        Architecture.from_diffusers(model_dir), use_cpu_initialization=True, params_dtype=dtype, pipeline_dtype=dtype,
        transformer_impl="local",
    )  # fmt: skip
    with layout(backend="gloo"):
        provider.finalize()
        model = WanModel(provider)
        load_into(model, model_dir)
        save_megatron_model([model], megatron_path)
        return sum(parameter.numel() for parameter in model.parameters())
