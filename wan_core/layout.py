"""Which parallel layouts can work: one set of rules for the model, Megatron-FSDP and `wan plan`."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from wan_core.architecture import Architecture
from wan_core.config import TrainConfig, check
from wan_core.recipe_values import recipe_values

SIZES = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
DEFAULTS: dict[str, Any] = {  # megatron's
    **dict.fromkeys(SIZES, 1), "sequence_parallel": False, "cp_comm_type": None, "recompute_granularity": None,
    "recompute_modules": None,
}  # fmt: skip


def check_layout(config: Any) -> None:
    """Refuse a layout that cannot work, before processes or groups exist.

    Args:
        config: a TransformerConfig, or an object with its fields of the same names.

    Raises:
        ValueError: heads or the feed-forward width do not divide over the ranks, or stages outnumber layers.
    """
    heads, layers = config.num_attention_heads, config.num_layers
    tp, cp, pp = config.tensor_model_parallel_size, config.context_parallel_size, config.pipeline_model_parallel_size
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    check(
        heads % tp == 0,
        f"num_attention_heads={heads} is not divisible by tensor_model_parallel_size={tp}; choose one of {divisors}",
    )
    check(
        config.cp_comm_type in (None, "a2a", "p2p"),
        f"cp_comm_type={config.cp_comm_type!r} is neither a2a, which exchanges heads (Ulysses, also when left out), "
        "nor p2p, a ring that passes on keys and values; choose one of them",
    )
    check(
        config.recompute_granularity in (None, "selective", "full"),
        f"recompute_granularity={config.recompute_granularity!r} is neither selective nor full; choose one, or leave "
        "it out",
    )
    check(
        not config.recompute_modules,
        f"recompute_modules={config.recompute_modules} names parts of megatron's own blocks; leave it out: selective "
        "recomputes norms, rotations, GELU and gated adds",
    )
    check(
        config.cp_comm_type == "p2p" or heads % (tp * cp) == 0,
        f"num_attention_heads={heads} is not divisible by tensor_model_parallel_size={tp} x "
        f"context_parallel_size={cp}, which exchanges heads; choose a product among {divisors}, or cp_comm_type=p2p",
    )
    check(
        config.ffn_hidden_size is None or config.ffn_hidden_size % tp == 0,
        f"ffn_hidden_size={config.ffn_hidden_size} is not divisible by tensor_model_parallel_size={tp}",
    )
    check(pp <= layers, f"pipeline_model_parallel_size={pp} exceeds num_layers={layers}; choose {layers} or less")
    check(
        not config.sequence_parallel or tp > 1,
        f"sequence_parallel=true needs tensor_model_parallel_size > 1, which is {tp}; set sequence_parallel=false",
    )


def check_ranks(config: Any, ranks: int) -> None:
    """Refuse a number of ranks that a layout does not divide.

    Raises:
        ValueError: names both, and the numbers of ranks below and above.
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    one = math.prod(sizes.values())  # ranks that hold one copy of the model
    named = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    check(
        ranks % one == 0,
        f"{ranks} ranks (nodes x processes_per_node) are no multiple of {named}; start "
        + " or ".join(str(near) for near in (ranks // one * one, ranks // one * one + one) if near)
        + ", or choose other sizes",
    )


def check_training(config: TrainConfig, architecture: Architecture, ranks: int) -> None:
    """Refuse the layout of a training run before any work starts: the recipe's, with its overrides.

    Raises:
        ValueError: it cannot work, or not on so many ranks.
    """
    prefix = "model."
    values = {key.removeprefix(prefix): value for key, value in recipe_values(config) if key.startswith(prefix)}
    layout = SimpleNamespace(**{**DEFAULTS, **asdict(architecture), **values})
    for name in (*SIZES, "num_attention_heads", "num_layers"):
        value = getattr(layout, name)
        check(type(value) is int and value >= 1, f"model.{name}={value!r} is not a number from 1 on")
    check_layout(layout)
    check_ranks(layout, ranks)


def check_fsdp(config: Any) -> None:
    """Refuse what Megatron-FSDP does not do.

    Raises:
        ValueError: there are pipeline stages.
    """
    pp = config.pipeline_model_parallel_size
    check(
        pp == 1,
        f"pipeline_model_parallel_size={pp} with Megatron-FSDP would leave the embedders' gradients unsummed over the "
        "stages; set it to 1, or dist.use_megatron_fsdp=false",
    )
