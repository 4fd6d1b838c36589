"""What a run says of itself: metrics.jsonl, a line to read, TensorBoard; W&B and MLflow where they are configured."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from wan_core.config import TEXT_LENGTH
from wan_core.parallel import Parallel
from wan_core.recipes import WanConfigContainer
from wan_core.step import WanStep
from wan_core.training_run import METRICS_NAME, Metrics, append_line, read_metrics

PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bfloat16, by the makers' tables


def peak_tflops(device: str) -> float | None:
    """Dense bfloat16 peak of a GPU by a part of its name; None: not known, and then there is no MFU."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)


class MetricsLog(Callback):
    """Every `logger.log_interval` steps, means since the time before."""

    def __init__(self, config: WanConfigContainer, step: WanStep, run_dir: Path) -> None:
        self.config, self.step, self.path = config, step, run_dir / METRICS_NAME
        self.interval = config.logger.log_interval
        # Bridge's own line and memory table are made for language models; its TensorBoard log goes on.
        config.logger.log_interval = sys.maxsize
        self.totals = torch.zeros(4, dtype=torch.float64)  # tokens, squared lengths, samples, packs since the last line
        self.steps = 0  # since the last line
        self.consumed = 0
        self.since = time.perf_counter()

    def on_train_start(self, context: CallbackContext) -> None:
        loggers(context.state)  # which connect now: what fails does so before a step was taken
        self.since = time.perf_counter()
        step = context.state.train_state.step
        if step and self.path.exists():
            before = [m.consumed_samples for m in read_metrics(self.path) if m.iteration <= step]
            self.consumed = before[-1] if before else 0

    def on_train_step_end(self, context: CallbackContext) -> None:
        state, parallel = context.state, Parallel.current()
        samples = state._flops_cross_seqlen_sum / TEXT_LENGTH
        self.totals += torch.tensor([state._flops_seqlen_sum, state._flops_seqlen_sq_sum, samples, self.step.num_packs])
        self.step.num_packs, self.steps = 0, self.steps + 1
        iteration, last = state.train_state.step + 1, self.config.train.train_iters
        if iteration % self.interval and iteration != last:
            return
        totals = self.totals.to("cuda", copy=True)
        dist.all_reduce(totals, group=parallel.dp_group)
        self.totals.zero_()
        seconds, waited = time.perf_counter() - self.since, self.step.data_seconds
        self.since, self.step.data_seconds = time.perf_counter(), 0.0
        steps, self.steps = self.steps, 0
        self.consumed += round(totals[2].item())
        if not parallel.is_last_stage:
            return
        metrics = self._metrics(context, iteration, totals.tolist(), steps, seconds, waited)
        if parallel.tp_rank == parallel.cp_rank == parallel.dp_rank == 0:
            append_line(self.path, metrics)
            print(line(metrics), flush=True)
        log(state, metrics)

    def _metrics(
        self, context: CallbackContext, iteration: int, totals: list[float], steps: int, seconds: float,
        waited: float,
    ) -> Metrics:  # fmt: skip
        tokens, squares, samples, packs = totals
        ranks = dist.get_world_size()
        flops = self.config.model._get_num_floating_point_operations_with_runtime_stats(
            0, int(tokens), int(squares), int(samples * TEXT_LENGTH), None
        )
        tflops = flops / seconds / ranks / 1e12
        peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return Metrics(
            iteration=iteration, train_iters=self.config.train.train_iters or 0,
            loss=float((context.loss_dict or {})["loss"]),
            learning_rate=float(context.optimizer.param_groups[0]["lr"]),
            grad_norm=float(context.user_state["grad_norm"]),
            step_seconds=round(seconds / steps, 4), tokens_per_second=round(tokens / seconds, 1),
            tokens_per_second_per_rank=round(tokens / seconds / ranks, 1), tflops_per_rank=round(tflops, 3),
            mfu=peak and round(tflops / peak, 4), consumed_samples=self.consumed,
            packing_efficiency=round(tokens / packs / self.config.dataset.tokens_per_pack, 4),
            peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
            data_wait_share=round(waited / seconds, 4),
            skipped_steps=context.user_state.get("skipped_steps", 0),
        )  # fmt: skip


def line(m: Metrics) -> str:
    """A step on one line."""
    return (
        f"iteration {m.iteration}/{m.train_iters} | loss {m.loss:.4f} | grad norm {m.grad_norm:.3f} | "
        f"lr {m.learning_rate:.2e} | {m.step_seconds:.3f} s/step | {m.tokens_per_second_per_rank:.0f} tokens/s and "
        f"{m.tflops_per_rank:.1f} TFLOP/s per rank"
        + (f", MFU {m.mfu:.1%}" if m.mfu is not None else "")
        + f" | packs {m.packing_efficiency:.1%} full | {m.peak_memory_gib:.1f} GiB | data wait {m.data_wait_share:.1%}"
    )


def loggers(state: Any) -> tuple[Any, Any, Any]:
    """TensorBoard's, W&B's and MLflow's, made when first asked for; None where not configured, or on other ranks."""
    return state.tensorboard_logger, state.wandb_logger, state.mlflow_logger


def log(state: Any, metrics: Metrics) -> None:
    """To whichever of Bridge's loggers this rank holds."""
    hidden = (
        "iteration",
        "train_iters",
        "loss",
        "learning_rate",
        "grad_norm",
    )  # Bridge logs these
    values = dataclasses.asdict(metrics)
    values = {f"wan/{name}": value for name, value in values.items() if name not in hidden and value is not None}
    tensorboard, wandb, mlflow = loggers(state)
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, metrics.iteration)
    if wandb:
        wandb.log(values, metrics.iteration)
    if mlflow:
        mlflow.log_metrics(values, step=metrics.iteration)
