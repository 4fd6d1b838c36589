"""Low-rank adapters of a training run: merged into the weights they were trained on, or as a diffusers LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import save_file
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.checkpoint import read_architecture, read_tensors, tensor_names
from wan_core.convert.mapping import modules_of, to_diffusers

IN, OUT, MAGNITUDE = ".adapter.linear_in.weight", ".adapter.linear_out.weight", ".adapter.weight_magnitude"
LORA_NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for in a folder


@dataclass(frozen=True)
class Adapter:
    """What is added to one linear layer's weight [out, in]; the scale alpha / dim is part of `up`."""

    down: Tensor  # [dim, in] float32
    up: Tensor  # [out, dim] float32
    magnitude: Tensor | None = None  # [out] float32, DoRA's lengths of the rows

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the adapter in it, in the weight's dtype."""
        summed = weight.float() + self.up @ self.down
        if self.magnitude is not None:
            summed *= (self.magnitude / summed.norm(dim=1))[:, None]
        return summed.to(weight.dtype)


def holds_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint (an iteration folder) holds adapters instead of whole weights."""
    return any(name.endswith(IN) for name in tensor_names(checkpoint))


def read_adapters(checkpoint: Path, prefix: str = "") -> dict[str, Adapter]:
    """Adapters by our name of their layer.

    Args:
        prefix: of the tensors to read, `checkpoint.EMA` for their averages.

    Raises:
        ValueError: the checkpoint holds none.
    """
    names = [name for name in tensor_names(checkpoint) if name.endswith((IN, OUT, MAGNITUDE))]
    names = [name for name in names if (name.startswith(prefix) if prefix else not name.startswith("optimizer."))]
    check(bool(names), f"{checkpoint} holds no {'averaged ' * bool(prefix)}adapters; give a run with lora.dim > 0")
    config = yaml.safe_load((checkpoint / "run_config.yaml").read_text(encoding="utf-8"))["lora"]
    scale = (config["alpha"] or config["dim"]) / config["dim"]
    tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in read_tensors(checkpoint, names).items()}
    layers = [name.removesuffix(IN) for name in tensors if name.endswith(IN)]
    return {
        layer: Adapter(tensors[layer + IN], tensors[layer + OUT] * scale, tensors.get(layer + MAGNITUDE))
        for layer in layers
    }


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Our weights with the adapters in them."""
    changed = {f"{layer}.weight": adapter.merged(weights[f"{layer}.weight"]) for layer, adapter in adapters.items()}
    return {**weights, **changed}


def to_diffusers_lora(adapters: Mapping[str, Adapter], architecture: Architecture) -> dict[str, Tensor]:
    """The state dict that `WanPipeline.load_lora_weights` takes: peft's names, alpha equal to the rank.

    A fused projection's adapter becomes one for q, k and v each: they share A, and B's rows are theirs.
    """
    result: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        modules = modules_of(layer, architecture)

        def rows(tensor: Tensor, count: int = len(modules)) -> list[Tensor]:
            if count == 1:
                return [tensor]
            parts = tensor.unflatten(0, (architecture.num_attention_heads, count, architecture.head_dim)).unbind(1)
            return [part.flatten(0, 1) for part in parts]

        for module, up in zip(modules, rows(adapter.up), strict=True):
            result[f"transformer.{module}.lora_A.weight"] = adapter.down.clone()
            result[f"transformer.{module}.lora_B.weight"] = up.contiguous()
        if adapter.magnitude is not None:
            for module, magnitude in zip(modules, rows(adapter.magnitude), strict=True):
                result[f"transformer.{module}.lora_magnitude_vector"] = magnitude.contiguous()
    return result


def export_lora(checkpoint: Path, output: Path, prefix: str = "") -> int:
    """Write the LoRA file of a checkpoint; returns its number of tensors.

    Args:
        output: a .safetensors file, or a folder for one of the usual name.
    """
    state = to_diffusers_lora(read_adapters(checkpoint, prefix), read_architecture(checkpoint))
    path = output if output.suffix == ".safetensors" else output / LORA_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"format": "pt"})
    return len(state)


def merged_weights(
    checkpoint: Path, base: Mapping[str, Tensor], architecture: Architecture, prefix: str = ""
) -> dict[str, Tensor]:
    """Diffusers' state dict of a checkpoint's adapters merged into our base weights."""
    return to_diffusers(merge(base, read_adapters(checkpoint, prefix)), architecture)
