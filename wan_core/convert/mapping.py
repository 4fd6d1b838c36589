"""One table between diffusers' `WanTransformer3DModel` and `WanModel`, used in both directions.

Every entry is a rename, or a reordering that is undone exactly: q, k and v rows are interleaved by head, the patch
embedding's Conv3d is flattened to a matrix. So import then export gives back every bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import PATCH_SIZE, check

OUTER = {  # ours -> diffusers, a module each
    "patch_embedding": "patch_embedding",
    "time_embedding.linear_1": "condition_embedder.time_embedder.linear_1",
    "time_embedding.linear_2": "condition_embedder.time_embedder.linear_2",
    "time_embedding.projection": "condition_embedder.time_proj",
    "text_embedding.linear_1": "condition_embedder.text_embedder.linear_1",
    "text_embedding.linear_2": "condition_embedder.text_embedder.linear_2",
    "head.linear": "proj_out",
}
IMAGE_OUTER = {
    "image_embedding.input_norm": "condition_embedder.image_embedder.norm1",
    "image_embedding.linear_1": "condition_embedder.image_embedder.ff.net.0.proj",
    "image_embedding.linear_2": "condition_embedder.image_embedder.ff.net.2",
    "image_embedding.output_norm": "condition_embedder.image_embedder.norm2",
}
LAYER = {
    "self_attention.linear_proj": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross_attention.linear_q": "attn2.to_q",
    "cross_attention.linear_proj": "attn2.to_out.0",
    "mlp.linear_fc1": "ffn.net.0.proj",
    "mlp.linear_fc2": "ffn.net.2",
}
LAYER_NORMS = {  # weight only
    "self_attention.q_norm": "attn1.norm_q",
    "self_attention.k_norm": "attn1.norm_k",
    "cross_attention.q_norm": "attn2.norm_q",
    "cross_attention.k_norm": "attn2.norm_k",
}
IMAGE_LAYER_NORMS = {"cross_attention.image_k_norm": "attn2.norm_added_k"}
FUSED = {  # ours -> diffusers' modules whose rows it interleaves by head
    "self_attention.linear_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attention.linear_kv": ("attn2.to_k", "attn2.to_v"),
}
IMAGE_FUSED = {"cross_attention.linear_image_kv": ("attn2.add_k_proj", "attn2.add_v_proj")}
KINDS = ("weight", "bias")


def _pairs(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Our name -> diffusers' names, for every parameter."""
    pairs: dict[str, tuple[str, ...]] = {}
    image = bool(architecture.image_dim)
    outer, norms, fused = (
        {**table, **(added if image else {})}
        for table, added in ((OUTER, IMAGE_OUTER), (LAYER_NORMS, IMAGE_LAYER_NORMS), (FUSED, IMAGE_FUSED))
    )
    for ours, theirs in outer.items():
        pairs |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in KINDS}
    pairs["head.modulation"] = ("scale_shift_table",)
    for n in range(architecture.num_layers):
        pairs[f"layers.{n}.modulation"] = (f"blocks.{n}.scale_shift_table",)
        for ours, theirs in norms.items():
            pairs[f"layers.{n}.{ours}.weight"] = (f"blocks.{n}.{theirs}.weight",)
        for kind in KINDS:
            for ours, theirs in LAYER.items():
                pairs[f"layers.{n}.{ours}.{kind}"] = (f"blocks.{n}.{theirs}.{kind}",)
            for ours, parts in fused.items():
                pairs[f"layers.{n}.{ours}.{kind}"] = tuple(f"blocks.{n}.{part}.{kind}" for part in parts)
    return pairs


def stays_float32(name: str) -> bool:
    """Whether one of our parameters is float32 also where the model is trained in bfloat16."""
    norms = ("modulation", "cross_norm.", "image_embedding.input_norm.", "image_embedding.output_norm.")
    return name.startswith("time_embedding.") or any(part in name for part in norms)


def modules_of(layer: str, architecture: Architecture) -> tuple[str, ...]:
    """Diffusers' modules behind one of our linear layers, in the order in which a fused one interleaves them."""
    return tuple(name.removesuffix(".weight") for name in _pairs(architecture)[f"{layer}.weight"])


def parameter_names(architecture: Architecture) -> set[str]:
    """Our names of all parameters."""
    return set(_pairs(architecture))


def _check_names(kind: str, found: Mapping[str, object], expected: set[str]) -> None:
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    check(
        not missing and not unknown,
        f"{kind} weights do not fit the architecture: missing {missing[:3]} ({len(missing)} in all), unknown "
        f"{unknown[:3]} ({len(unknown)} in all); check that the weights and config.json belong together",
    )


def from_diffusers(
    weights: Mapping[str, Tensor], architecture: Architecture, only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors from diffusers' state dict, one at a time; with `only`, those of our names.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    pairs = _pairs(architecture)
    _check_names("diffusers", weights, {name for names in pairs.values() for name in names})
    for ours, theirs in pairs.items():
        if only is not None and ours not in only:
            continue
        parts = [weights[name] for name in theirs]
        if len(parts) > 1:
            split = [part.unflatten(0, (architecture.num_attention_heads, architecture.head_dim)) for part in parts]
            yield ours, torch.stack(split, dim=1).flatten(0, 2)
        elif ours == "patch_embedding.weight":
            yield ours, parts[0].flatten(1)
        else:
            yield ours, parts[0].squeeze(0) if ours.endswith("modulation") else parts[0]


def to_diffusers(weights: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Our state dict to diffusers'.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    pairs = _pairs(architecture)
    _check_names("megatron", weights, set(pairs))
    heads = architecture.num_attention_heads
    result: dict[str, Tensor] = {}
    for ours, theirs in pairs.items():
        weight = weights[ours]
        if len(theirs) > 1:
            parts = weight.unflatten(0, (heads, len(theirs), architecture.head_dim)).unbind(1)
            result |= {name: torch.cat(part.unbind()) for name, part in zip(theirs, parts, strict=True)}  # no views
        elif ours == "patch_embedding.weight":
            result[theirs[0]] = weight.unflatten(1, (architecture.in_channels, *PATCH_SIZE))
        else:
            result[theirs[0]] = weight.unsqueeze(0) if ours.endswith("modulation") else weight
    return {name: tensor.contiguous() for name, tensor in result.items()}
