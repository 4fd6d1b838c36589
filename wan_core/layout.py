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
COUNTS = (*(f"model.{name}" for name in (*SIZES, "num_attention_heads", "num_layers")), "train.micro_batch_size")
UNUSED = (  # by our model, which gives every stage as many layers, to one more or less
    "virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {  # of what a recipe may leave out: megatron's, and those of `recipes`
    **dict.fromkeys(COUNTS, 1), **{f"model.{name}": None for name in UNUSED}, "model.sequence_parallel": False,
    "model.cp_comm_type": None, "model.recompute_granularity": None, "model.recompute_modules": None,
    "model.recompute_method": None, "model.recompute_num_layers": None, "train.global_batch_size": 1,
    "dataset.batch_unit": "packs", "dist.use_megatron_fsdp": False, "ddp.use_megatron_fsdp": False,
}  # fmt: skip


def check_layout(config: Any) -> None:
    """Refuse a layout that cannot work, before processes or groups exist.

    Args:
        config: a TransformerConfig, or an object with its fields of the same names.

    Raises:
        ValueError: heads or the feed-forward width do not divide over the ranks, stages outnumber layers, or a setting
            would do nothing.
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
    method, count = config.recompute_method, config.recompute_num_layers
    check(
        config.recompute_granularity == "full" or method is count is None,
        f"recompute_method={method} and recompute_num_layers={count} belong to recompute_granularity=full, which is "
        f"{config.recompute_granularity}; set both to null",
    )
    check(
        config.recompute_granularity != "full" or (method in ("block", "uniform") and type(count) is int),
        f"recompute_granularity=full needs recompute_method (block or uniform), which is {method}, and "
        f"recompute_num_layers, which is {count}; uniform and 1 recompute every layer",
    )
    most = -(-layers // pp)
    check(
        method != "uniform" or count == 1,
        f"recompute_num_layers={count} with recompute_method=uniform: every layer is recomputed by itself; set it to 1",
    )
    check(
        method != "block" or 1 <= count <= most,
        f"recompute_num_layers={count} is not between 1 and {most}, the layers of a pipeline stage; choose one of "
        "them, or recompute_granularity=null for none",
    )
    for name in UNUSED:
        value = getattr(config, name, None)
        check(not value, f"{name}={value}, but stages get equal numbers of layers, each of them once; leave it out")
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


def check_batch(micro_batch_size: int, global_batch_size: int, unit: str, data_ranks: int) -> None:
    """Refuse a micro-batch of more than one pack, or a batch that does not divide over the data-parallel ranks.

    Raises:
        ValueError: names the value, and near ones that do.
    """
    check(
        micro_batch_size == 1,
        f"train.micro_batch_size={micro_batch_size}, but a micro-batch is one pack; set it to 1",
    )
    near = max(data_ranks, global_batch_size // data_ranks * data_ranks)
    check(
        global_batch_size >= 1 and global_batch_size % data_ranks == 0,
        f"train.global_batch_size={global_batch_size} {unit} do not divide over {data_ranks} data-parallel ranks; "
        f"choose {near} or {near + data_ranks}",
    )


def check_training(config: TrainConfig, architecture: Architecture, ranks: int) -> None:
    """Refuse the layout of a training run before any work starts: the recipe's, with its overrides.

    Raises:
        ValueError: it cannot work, or not on so many ranks.
    """
    model = {f"model.{name}": value for name, value in asdict(architecture).items()}
    values = {**DEFAULTS, **model, **dict(recipe_values(config))}
    for key in COUNTS:
        check(type(values[key]) is int and values[key] >= 1, f"{key}={values[key]!r} is not a number from 1 on")
    size = values["train.global_batch_size"]
    check(type(size) is int, f"train.global_batch_size={size!r} is not a number")
    prefix = "model."
    layout = SimpleNamespace(**{key.removeprefix(prefix): values[key] for key in values if key.startswith(prefix)})
    check_layout(layout)
    check_ranks(layout, ranks)
    if values["dist.use_megatron_fsdp"] or values["ddp.use_megatron_fsdp"]:
        check_fsdp(layout)
    data_ranks = ranks // math.prod(values[f"model.{name}"] for name in SIZES)
    check_batch(values["train.micro_batch_size"], size, values["dataset.batch_unit"], data_ranks)


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
