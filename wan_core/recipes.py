"""A complete ConfigContainer from a recipe, a training mode and overrides: later ones win, nothing wins silently.

Order: defaults here, the mode's flow-matching preset, the recipe's YAML, the user's YAML, `key=value` overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.bridge.training.config import (
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    RNGConfig,
    SchedulerConfig,
    TrainingConfig,
)  # fmt: skip
from megatron.bridge.training.mixed_precision import bf16_mixed
from megatron.bridge.training.tokenizers.config import TokenizerConfig

from wan_core.architecture import ARCHITECTURES, Architecture
from wan_core.checkpointing import WanCheckpointConfig
from wan_core.config import TrainConfig, check
from wan_core.dataset import WanDatasetProvider
from wan_core.ema import WanOptimizerConfig
from wan_core.flow_matching import FlowMatchingConfig
from wan_core.fsdp import configure as configure_fsdp
from wan_core.lora import LoraConfig
from wan_core.model.provider import WanProvider
from wan_core.stability import StabilityConfig
from wan_core.training_samples import SamplesConfig
from wan_core.validation import WanValidationConfig

RECIPES = Path(__file__).parent / "conf"


@dataclass(kw_only=True)
class WanConfigContainer(ConfigContainer):
    """Bridge's container with the sections of our own; all of it is stored in every checkpoint."""

    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)

    def fill_in(self) -> None:
        """Fields that follow from others.

        Raises:
            ValueError: validation is asked for, and there is nothing to validate on.
        """
        self.dataset.caption_dropout, self.dataset.seed = self.flow_matching.caption_dropout, self.rng.seed
        self.dataset.stratified = self.flow_matching.stratified
        validation = self.validation
        if not validation.eval_interval:
            return
        validation.check()
        if validation.eval_global_batch_size is None:
            validation.eval_global_batch_size = self.train.global_batch_size
        self.dataset.validation_sigmas = validation.sigmas
        self.dataset.validation_samples = validation.max_samples
        self.dataset.validation_packs_per_step = validation.eval_global_batch_size
        validation.eval_iters = self.dataset.num_validation_packs // validation.eval_global_batch_size

    def validate(self) -> None:
        """Bridge's checks, and those of packing.

        Raises:
            ValueError: a micro-batch of more than one pack.
        """
        size = self.train.micro_batch_size
        check(size == 1, f"train.micro_batch_size={size}, but a micro-batch is one pack; set it to 1")
        super().validate()


def recipe_path(name: str) -> Path:
    """The YAML of a recipe.

    Raises:
        ValueError: there is no recipe of this name.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    check(name in known, f"recipe {name!r} does not exist; choose one of {', '.join(known)}, or give --config-file")
    return RECIPES / f"{name}.yaml"


def build(
    config: TrainConfig, *, model_dir: Path | None, dataset_dir: Path | None, run_dir: Path | None,
    config_file: Path | None = None, mock: bool = False,
) -> WanConfigContainer:  # fmt: skip
    """The container of one training run.

    Args:
        model_dir: Diffusers folder that tells the architecture, and the initial weights when finetuning.
        dataset_dir: output of the index stage.
        run_dir: where checkpoints and TensorBoard logs go; a checkpoint there is resumed.

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or values do not go together.
    """
    recipe = yaml.safe_load(recipe_path(config.recipe).read_text(encoding="utf-8"))
    user = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {} if config_file else {}
    size = user.pop("architecture", recipe.pop("architecture", "t2v-1.3B"))
    recipe.pop("architecture", None)
    architecture = Architecture.from_diffusers(model_dir) if model_dir else ARCHITECTURES[size]
    container = defaults(architecture, config)
    if model_dir is not None and config.mode == "finetune":
        container.model.initial_weights = str(model_dir)
    container.dataset.path = str(dataset_dir) if dataset_dir else None
    container.dataset.mock = mock
    container.dataset.mock_text_dim, container.dataset.mock_image_dim = architecture.text_dim, architecture.image_dim
    if run_dir is not None:
        container.checkpoint.save = container.checkpoint.load = str(run_dir / "checkpoints")
        container.logger.tensorboard_dir = str(run_dir / "tensorboard")
    given = [
        (f"{section}.{key}", value)
        for values in (recipe, user)
        for section, entries in values.items()
        for key, value in entries.items()
    ]
    for text in config.overrides:
        key, _, value = text.partition("=")
        given.append((key.strip(), yaml.safe_load(value)))
    for key, value in given:
        apply_override(container, key, value)
    configure_fsdp(container, {key for key, _ in given})
    if container.lora.dim:
        check(
            container.model.initial_weights is not None or container.checkpoint.pretrained_checkpoint is not None,
            f"lora.dim={container.lora.dim} needs weights to adapt; give --training-mode finetune and --model, or "
            "checkpoint.pretrained_checkpoint",
        )
        container.peft = container.lora.adapters()
        container.checkpoint.pretrained_checkpoint = (
            container.checkpoint.pretrained_checkpoint or container.model.initial_weights
        )
    for name in ("start_weight_decay", "end_weight_decay"):  # what Bridge's scheduler would put in its place
        if getattr(container.scheduler, name) is None:
            setattr(container.scheduler, name, container.optimizer.weight_decay)
    if container.scheduler.lr_decay_iters is None:
        container.scheduler.lr_decay_iters = container.train.train_iters
    container.samples.check(container.model.architecture)
    if container.dataset.path is not None or mock:
        container.fill_in()
    return container


def defaults(architecture: Architecture, config: TrainConfig) -> WanConfigContainer:
    """What all recipes share."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return WanConfigContainer(
        model=WanProvider.of_architecture(
            architecture, params_dtype=dtype, pipeline_dtype=dtype, bf16=cuda, autocast_dtype=dtype,
            transformer_impl="transformer_engine" if cuda else "local", gradient_accumulation_fusion=False,
        ),
        flow_matching=FlowMatchingConfig.for_mode(config.mode),
        train=TrainingConfig(
            train_iters=1000, global_batch_size=1, micro_batch_size=1, exit_signal_handler=True,
            manual_gc=cuda, manual_gc_interval=100 if cuda else 0,
        ),
        validation=WanValidationConfig(eval_iters=0, eval_interval=0),
        optimizer=WanOptimizerConfig(
            optimizer="adam", lr=1e-5, min_lr=0.0, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8,
            clip_grad=1.0, bf16=cuda, params_dtype=dtype, use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=0, lr_warmup_init=0.0, weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=cuda,
            overlap_param_gather=cuda, average_in_collective=False,
            check_for_nan_in_grad=False,  # it ends the run on the spot; the stability section decides instead
        ),
        dataset=WanDatasetProvider(),
        logger=LoggerConfig(log_interval=10, log_timers_to_tensorboard=False, tensorboard_log_interval=10),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1),
        checkpoint=WanCheckpointConfig(
            save_interval=1000, ckpt_format="torch_dist", async_save=False, fully_parallel_save=True,
            dist_ckpt_optim_fully_reshardable=True,  # resumes under any layout, not only the one that saved
        ),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(distributed_backend="nccl" if cuda else "gloo", use_gloo_process_groups=True),
        mixed_precision=bf16_mixed() if cuda else None,
    )  # fmt: skip


def apply_override(container: Any, key: str, value: Any) -> None:
    """Set `section.field` (any depth) to a value that fits the field's type.

    Raises:
        ValueError: the key is unknown (the nearest one is named), or the value does not fit.
    """
    *path, name = key.split(".")
    owners = [container]
    for part in path:
        _check_key(owners[-1], part, key)
        owners.append(getattr(owners[-1], part))
    _check_key(owners[-1], name, key)
    value = _fitting(owners[-1], name, key, value)
    for owner, attribute in zip(reversed(owners), reversed([*path, name]), strict=True):
        if not owner.__dataclass_params__.frozen:
            setattr(owner, attribute, value)
            return
        value = dataclasses.replace(owner, **{attribute: value})  # checks it again


def _check_key(owner: Any, name: str, key: str) -> None:
    known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {key.replace(name, near[0])}?" if near else f"choose one of {', '.join(known[:12])} ..."
    raise ValueError(f"unknown key {key!r}: {type(owner).__name__} has no field {name!r}; {hint}")


def _fitting(owner: Any, name: str, key: str, value: Any) -> Any:
    """The value in the field's own type: int to float, list to tuple, "bf16" to torch.bfloat16."""
    current = getattr(owner, name)
    if isinstance(current, torch.dtype) and isinstance(value, str):
        dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}.get(value, value), None)
        check(isinstance(dtype, torch.dtype), f"{key}={value!r} is not a dtype; write bfloat16 or float32")
        return dtype
    if isinstance(value, list) and isinstance(current, tuple):
        value = tuple(value)
    if isinstance(value, str) and isinstance(current, float):  # YAML reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{key}={value!r} is not a number; the present value is {current}") from None
    if isinstance(value, int) and isinstance(current, float) and not isinstance(value, bool):
        value = float(value)
    hint = typing.get_type_hints(type(owner)).get(name, Any)
    plain = _plain_types(hint)
    fits = not plain or (type(value) in plain)
    names = ", ".join(sorted(t.__name__ for t in plain))
    check(
        fits,
        f"{key}={value!r} is {type(value).__name__}, but the field takes {names}; the present value is {current!r}",
    )
    return value


def _plain_types(hint: Any) -> set[type]:
    """The plain types that a field's annotation admits; empty where it names others, too."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return set().union(*parts) if all(parts) else set()
    return {hint} if hint in (int, float, bool, str, type(None)) else set()
