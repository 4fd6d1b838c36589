"""The training run behind `wan_core.train`: checks, Bridge's `pretrain()`, metrics and the record."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import megatron.bridge.training.eval as bridge_eval
import megatron.bridge.training.initialize as bridge_initialize
import megatron.bridge.training.setup as bridge_setup
import megatron.bridge.training.train as bridge_train
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.pretrain import pretrain

from wan_core import checkpoints
from wan_core.checkpointing import Resume, prepare_resume
from wan_core.config import TrainConfig
from wan_core.convert.formats import loadable
from wan_core.ema import AverageWeights
from wan_core.metrics_log import MetricsLog
from wan_core.model.kernels import attention_backend
from wan_core.recipes import WanConfigContainer, build
from wan_core.stability import Stability
from wan_core.step import WanStep
from wan_core.training_run import (
    check_encoders,
    claim,
    fingerprints,
    forget_record,
    noise_identity,
    run_identity,
    write_record,
)  # fmt: skip
from wan_core.training_samples import SampleVideos
from wan_core.validation import ValidationLog

INTERRUPTED = 75  # exit code of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h


def callbacks(container: WanConfigContainer, step: WanStep, model: Path | None, run_dir: Path) -> list[Callback]:
    """What goes along with the loop, in the order in which it is called."""
    decay, samples = container.optimizer.ema_decay, container.samples
    result: list[Callback] = [Resume(), Stability(container.stability, step, run_dir)]
    result += [AverageWeights(decay)] if decay else []
    result += [MetricsLog(container, step, run_dir), ValidationLog(container, run_dir)]
    if samples.interval:
        result.append(SampleVideos(samples, model, run_dir, use_ema=bool(decay)))
    return result


@contextlib.contextmanager
def explained_end(container: WanConfigContainer) -> Iterator[None]:
    """Say in a sentence why a run ends early.

    Raises:
        SystemExit: `INTERRUPTED`, where a signal or a time limit stopped the run, which Bridge ends with exit code 0.
        RuntimeError: a data-loader worker died.
    """
    try:
        yield
    except SystemExit as end:
        if end.code not in (0, None):
            raise
        iteration = checkpoints.latest(Path(container.checkpoint.save)) if container.checkpoint.save else None
        saved = f"saved at iteration {iteration}" if iteration is not None else "nothing saved"
        print(f"interrupted, {saved}; the same command goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"a process that reads training data died ({str(error).splitlines()[0]}), mostly for want of memory or of "
            "room in /dev/shm; lower dataset.num_workers. The same command goes on from the last checkpoint"
        ) from error


def run(
    config: TrainConfig,
    model: Path | None,
    dataset: Path | None,
    run_dir: Path | None,
    config_file: Path | None,
    mock: bool,
    extra: Sequence[Callback] = (),
) -> None:
    """Train until `train_iters`, from the run folder's latest checkpoint if it has one.

    Args:
        model: Diffusers folder: the architecture, and the weights to finetune.
        dataset: output of the index stage.
        extra: callbacks before those of every run.

    Raises:
        ValueError: the arguments do not make a run.
        SystemExit: the run was asked to stop; it has saved, and its exit code says that it can go on.
    """
    started = time.monotonic()
    container = build(config, model_dir=model, dataset_dir=dataset, run_dir=run_dir, config_file=config_file, mock=mock)
    run_dir = run_dir or (Path(container.checkpoint.save) if container.checkpoint.save else None)
    if run_dir is None:
        raise ValueError("no output folder: give --run-dir DIR, or checkpoint.save=DIR")
    container.dataset.check(container.model.architecture)
    wanted = None
    if model and dataset and not config_file and not mock:
        check_encoders(dataset, model)
        claim(run_dir, run_identity(config, dataset, model) | noise_identity(container.flow_matching))
        _, wanted = fingerprints(config, dataset, model)
        forget_record(run_dir)
    else:
        claim(run_dir, noise_identity(container.flow_matching))
    run_dir.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    prepare_resume(container, rank)
    if rank == 0 and attention_backend() == "cudnn":
        # 1.3B at 37,440 tokens trains an eighth slower, and 5 % more memory goes (docs/benchmarks/h200.md).
        print("attention runs on cuDNN; FlashAttention 4 is faster and comes with uv sync --extra gpu", flush=True)
    # GPT dataset helpers, for which pip's megatron-core has no Makefile: compiling them would end the process.
    bridge_initialize.compile_helpers = lambda: None
    bridge_eval.print_rank_last = lambda message: None  # tables of perplexities; ValidationLog says it in a line
    if container.model.initial_weights is not None:  # read by the provider; Bridge would want a Megatron checkpoint
        bridge_setup._create_peft_pre_wrap_hook = lambda cfg, state: partial(
            bridge_setup._apply_peft_transformation, cfg.peft
        )
    step = WanStep(container.flow_matching, container.validation.sigmas)
    bridge_train.get_forward_backward_func = partial(step.schedule, container.dataset)
    with loadable(container.checkpoint), explained_end(container):
        pretrain(container, step, callbacks=[*extra, *callbacks(container, step, model, run_dir)])
    if wanted and rank == 0:
        write_record(run_dir, config, wanted, time.monotonic() - started)
