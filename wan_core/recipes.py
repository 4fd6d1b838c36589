"""A complete ConfigContainer from a recipe, a training mode and overrides: later ones win, nothing wins silently.

Order: defaults here, the mode's flow-matching preset, the recipe's YAML, the user's YAML, `key=value` overrides.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
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
from wan_core.layout import check_batch, check_layout, check_ranks
from wan_core.lora import LoraConfig
from wan_core.model.kernels import FLASH_FEATURES, attention_backend
from wan_core.model.provider import WanProvider
from wan_core.overrides import apply_override
from wan_core.recipe_values import ARCHITECTURE, recipe_values
from wan_core.stability import StabilityConfig
from wan_core.training_samples import SamplesConfig
from wan_core.validation import WanValidationConfig


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
        self.dataset.dropped_caption = self.flow_matching.dropped_caption
        self.dataset.batch_size = self.train.global_batch_size
        validation = self.validation
        if not validation.eval_interval:
            return
        validation.check()
        if validation.eval_global_batch_size is None:  # packs, whatever training counts
            in_packs = self.dataset.batch_unit == "packs"
            validation.eval_global_batch_size = self.train.global_batch_size if in_packs else self.data_ranks
        self.dataset.validation_sigmas = validation.sigmas
        self.dataset.validation_samples = validation.max_samples
        self.dataset.validation_packs_per_step = validation.eval_global_batch_size
        validation.eval_iters = self.dataset.num_validation_packs // validation.eval_global_batch_size

    def get_data_parallel_size(self, world_size: int) -> int:
        """Bridge's, which asks for it before anything else.

        Raises:
            ValueError: the layout cannot work, or not on so many ranks, or not with what is installed.
        """
        check_layout(self.model)
        ring = self.model.context_parallel_size > 1 and self.model.cp_comm_type == "p2p"
        check(
            not ring or attention_backend() != "cudnn",
            "cp_comm_type=p2p needs FlashAttention 4 on GPUs, which is not installed here; run uv sync --extra gpu, or "
            "choose a2a",
        )
        features = self.model.kv_channels or self.model.hidden_size // self.model.num_attention_heads
        check(
            not ring or attention_backend() == "sdpa" or features >= FLASH_FEATURES,
            f"cp_comm_type=p2p needs heads of {FLASH_FEATURES} features or more on GPUs, and these have {features}: "
            "FlashAttention 4's gradients are wrong below; choose a2a",
        )
        check_ranks(self.model, world_size)
        return int(super().get_data_parallel_size(world_size))

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks that the layout leaves."""
        return self.get_data_parallel_size(int(os.environ.get("WORLD_SIZE", 1)))

    def validate(self) -> None:
        """Bridge's checks, and those of packing.

        Raises:
            ValueError: a micro-batch of more than one pack, or a batch that does not divide over the ranks.
        """
        train = self.train
        check_batch(train.micro_batch_size, train.global_batch_size, self.dataset.batch_unit, self.data_ranks)
        super().validate()


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
    given = recipe_values(config, config_file)
    size = dict(given).get(ARCHITECTURE, "t2v-1.3B")
    check(size in ARCHITECTURES, f"architecture={size!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    given = [(key, value) for key, value in given if key != ARCHITECTURE]
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
    for key, value in given:
        apply_override(container, key, value)
    if "logger.tensorboard_log_interval" not in dict(given):  # of Bridge's curves: loss, learning rate, gradient norm
        container.logger.tensorboard_log_interval = container.logger.log_interval
    name_loggers(container.logger, run_dir)
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


def name_loggers(logger: LoggerConfig, run_dir: Path | None) -> None:
    """Weights & Biases' and MLflow's runs are called as the run folder, where the user gives no other name.

    Raises:
        ValueError: the package that a key asks for is not installed.
    """
    for key, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        check(
            getattr(logger, key) is None or find_spec(package) is not None,
            f"logger.{key}={getattr(logger, key)} needs the package {package}, which is not installed; install it "
            f"(uv pip install {package}), or leave the key out",
        )
    if run_dir is not None and logger.wandb_project:
        logger.wandb_exp_name = logger.wandb_exp_name or run_dir.name
        logger.wandb_save_dir = logger.wandb_save_dir or str(run_dir)
    if run_dir is not None and logger.mlflow_experiment:
        logger.mlflow_run_name = logger.mlflow_run_name or run_dir.name


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
        logger=LoggerConfig(
            log_interval=10, log_timers_to_tensorboard=False,
            mlflow_log_artifacts=False,  # it would upload every checkpoint, while training waits
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1),
        checkpoint=WanCheckpointConfig(
            save_interval=1000, ckpt_format="torch_dist", async_save=False, fully_parallel_save=True,
            dist_ckpt_optim_fully_reshardable=True,  # resumes under any layout, not only the one that saved
        ),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(distributed_backend="nccl" if cuda else "gloo", use_gloo_process_groups=True),
        mixed_precision=bf16_mixed() if cuda else None,
    )  # fmt: skip
