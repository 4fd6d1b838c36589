"""The training run behind `wan_core.train`: checks, Bridge's `pretrain()`, metrics and the record."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import megatron.bridge.training.initialize as bridge_initialize
import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.pretrain import pretrain

from wan_core.config import TEXT_LENGTH, TrainConfig, check
from wan_core.convert.formats import readable
from wan_core.parallel import Parallel
from wan_core.recipes import WanConfigContainer, build
from wan_core.step import WanStep
from wan_core.training_run import (
    METRICS_NAME,
    Metrics,
    append_metrics,
    check_encoders,
    claim,
    fingerprints,
    forget_record,
    read_metrics,
    run_identity,
    write_record,
)  # fmt: skip


class MetricsLog(Callback):
    """Writes metrics.jsonl, and one line to standard output, every `logger.log_interval` steps."""

    def __init__(self, config: WanConfigContainer, run_dir: Path) -> None:
        self.config, self.path, self.interval = config, run_dir / METRICS_NAME, config.logger.log_interval
        # Bridge's own line and memory table are made for language models; its TensorBoard log goes on.
        config.logger.log_interval = sys.maxsize
        self.totals = torch.zeros(4, dtype=torch.float64)  # tokens, squared lengths, samples, packs since the last line
        self.consumed = 0
        self.since = time.perf_counter()

    def on_train_start(self, context: CallbackContext) -> None:
        self.since = time.perf_counter()
        step = context.state.train_state.step
        if step and self.path.exists():
            before = [m.consumed_samples for m in read_metrics(self.path) if m.iteration <= step]
            self.consumed = before[-1] if before else 0

    def on_train_step_end(self, context: CallbackContext) -> None:
        state, parallel = context.state, Parallel.current()
        samples = state._flops_cross_seqlen_sum / TEXT_LENGTH
        packs = self.config.train.global_batch_size / parallel.dp
        self.totals += torch.tensor([state._flops_seqlen_sum, state._flops_seqlen_sq_sum, samples, packs])
        iteration, last = state.train_state.step + 1, self.config.train.train_iters
        if iteration % self.interval and iteration != last:
            return
        totals = self.totals.to("cuda")
        dist.all_reduce(totals, group=parallel.dp_group)
        tokens, squares, samples, packs = totals.tolist()
        self.totals.zero_()
        seconds = time.perf_counter() - self.since
        self.since = time.perf_counter()
        self.consumed += round(samples)
        if not (parallel.is_last_stage and parallel.tp_rank == parallel.cp_rank == parallel.dp_rank == 0):
            return
        steps = packs / self.config.train.global_batch_size
        flops = self.config.model._get_num_floating_point_operations_with_runtime_stats(
            0, int(tokens), int(squares), int(samples * TEXT_LENGTH), None
        )
        metrics = Metrics(
            iteration=iteration, train_iters=last or 0, loss=float(context.loss_dict["loss"]),
            learning_rate=float(context.optimizer.param_groups[0]["lr"]), grad_norm=float(context.grad_norm or 0.0),
            step_seconds=round(seconds / steps, 4), tokens_per_second=round(tokens / seconds, 1),
            tflops_per_rank=round(flops / seconds / dist.get_world_size() / 1e12, 3), consumed_samples=self.consumed,
            packing_efficiency=round(tokens / packs / self.config.dataset.tokens_per_pack, 4),
            peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        )  # fmt: skip
        append_metrics(self.path, metrics)
        print(
            f"iteration {iteration}/{last} | loss {metrics.loss:.4f} | grad norm {metrics.grad_norm:.3f} | "
            f"lr {metrics.learning_rate:.2e} | {metrics.step_seconds:.3f} s/step | "
            f"{metrics.tokens_per_second:.0f} tokens/s | {metrics.tflops_per_rank:.1f} TFLOP/s per rank",
            flush=True,
        )


def run(
    config: TrainConfig,
    model: Path | None,
    dataset: Path | None,
    run_dir: Path | None,
    config_file: Path | None,
    mock: bool,
) -> None:
    """Train until `train_iters`, from the run folder's latest checkpoint if it has one.

    Args:
        model: Diffusers folder: the architecture, and the weights to finetune.
        dataset: output of the index stage.

    Raises:
        ValueError: the arguments do not make a run.
    """
    started = time.monotonic()
    container = build(config, model_dir=model, dataset_dir=dataset, run_dir=run_dir, config_file=config_file, mock=mock)
    run_dir = run_dir or (Path(container.checkpoint.save) if container.checkpoint.save else None)
    if run_dir is None:
        raise ValueError("no output folder: give --run-dir DIR, or checkpoint.save=DIR")
    check(
        mock or container.dataset.path is not None,
        "no dataset: give --dataset DIR (the index stage's output) or dataset.path=DIR, or --mock",
    )
    wanted = None
    if model and dataset and not config_file and not mock:
        check_encoders(dataset, model)
        claim(run_dir, run_identity(config, dataset, model))
        _, wanted = fingerprints(config, dataset, model)
        forget_record(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    # GPT dataset helpers, for which pip's megatron-core has no Makefile: compiling them would end the process.
    bridge_initialize.compile_helpers = lambda: None
    checkpoint = container.checkpoint
    with (
        readable(checkpoint.load, checkpoint.ckpt_format) as checkpoint.load,
        readable(checkpoint.pretrained_checkpoint, checkpoint.ckpt_format) as checkpoint.pretrained_checkpoint,
    ):
        pretrain(container, WanStep(container.flow_matching), callbacks=[MetricsLog(container, run_dir)])
    if wanted and rank == 0:
        write_record(run_dir, config, wanted, time.monotonic() - started)
