"""What happens to a step whose loss or gradient cannot be trusted: it is skipped, the run goes back, or it stops.

The verdict falls between the gradients and the update, on values that all ranks share (the loss over the global batch,
the gradient norm over all ranks), so every rank and every layout decides alike, and a bad update is never made.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import load_checkpoint
from megatron.bridge.training.utils.checkpoint_utils import read_run_config, read_train_state

from wan_core import checkpoints
from wan_core.checkpointing import CheckpointManager
from wan_core.config import STRICT, check
from wan_core.step import WanStep
from wan_core.training_run import append_line

LOG_NAME = "bad_steps.jsonl"


@dataclass(frozen=True)
class StabilityConfig:
    """When a step is bad, and what follows from it."""

    on_bad_steps: Literal["skip", "rollback", "stop"] = "skip"
    max_bad_steps: int = 5  # so many in a row are skipped; then `rollback` loads the last checkpoint, `skip` stops
    max_rollbacks: int = 3  # in one process; the next stops
    spike_factor: float = (
        0.0  # a loss or gradient norm above this multiple of its median is bad; 0: only non-finite ones
    )
    history: int = 128  # good steps that the medians are taken over; spikes are looked for from an eighth of them on
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.max_bad_steps >= 1, f"stability.max_bad_steps={self.max_bad_steps} is below 1; choose 5")
        check(self.max_rollbacks >= 0, f"stability.max_rollbacks={self.max_rollbacks} is negative; choose 3")
        check(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"stability.spike_factor={self.spike_factor} is not above 1; choose 10, or 0 to look for no spikes",
        )
        check(self.history >= 8, f"stability.history={self.history} is below 8; choose 128")


@dataclass(frozen=True)
class BadStep:
    """A line of bad_steps.jsonl."""

    iteration: int
    loss: float
    grad_norm: float
    action: Literal["skip", "rollback", "stop"]
    reason: str
    samples: tuple[str, ...]  # keys of the global batch


class Stability(Callback):
    """Carries the policy out. What a resumed run needs to decide as an unbroken one lies in every checkpoint."""

    def __init__(self, config: StabilityConfig, step: WanStep, run_dir: Path) -> None:
        self.config, self.step, self.path = config, step, run_dir / LOG_NAME
        self.losses: deque[float] = deque(maxlen=config.history)
        self.norms: deque[float] = deque(maxlen=config.history)
        self.skipped = 0  # updates that were not made, since the run began
        self.in_a_row = 0
        self.rollbacks = 0
        self.loss = math.nan
        self.norm: float | None = None  # of the present step, once measured
        self.reason = ""  # why the present step is bad

    def on_train_start(self, context: CallbackContext) -> None:
        state = context.user_state.get("loaded", {}).get("stability", {})
        self.losses.extend(state.get("losses", ()))
        self.norms.extend(state.get("norms", ()))
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        context.user_state.setdefault("saved", {})["stability"] = self.state
        context.user_state["skipped_steps"] = self.skipped
        self._guard(context.optimizer)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row,
        }  # fmt: skip

    def _guard(self, optimizer: Any) -> None:
        """Ask for the verdict once the gradient norm is known; a bad step ends as one whose gradients overflow."""
        update = optimizer.step_with_ready_grads

        def guarded() -> bool:
            if self.norm is None:  # a lone optimizer measures only what it clips
                self.norm = float(optimizer.get_grad_norm())
            self.loss = self.step.global_loss()
            self.reason = self.verdict()
            return False if self.reason else update()

        # A chain of optimizers asks for the norm, then clips; a lone one (Megatron-FSDP's) does both in one call.
        optimizer.get_grad_norm = self._measured(optimizer.get_grad_norm)
        optimizer.clip_grad_norm = self._measured(optimizer.clip_grad_norm)
        optimizer.step_with_ready_grads = guarded

    def _measured(self, grad_norm: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, whose result is kept."""

        def measured(*args: Any) -> Any:
            norm = grad_norm(*args)
            self.norm = float(norm)
            return norm

        return measured

    def verdict(self) -> str:
        """Why the present step is bad; empty for a good one, which joins the history."""
        assert self.norm is not None
        measures = (("loss", self.loss, self.losses), ("gradient norm", self.norm, self.norms))
        for name, value, before in measures:
            if not math.isfinite(value):
                return f"{name} {value}"
            if self.config.spike_factor and len(before) >= self.config.history // 8:
                median = statistics.median(before)
                if value > self.config.spike_factor * median:
                    return f"{name} {value:.4g} is {value / median:.1f} times its median {median:.4g}"
        self.losses.append(self.loss)
        self.norms.append(self.norm)
        return ""

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Raises `FloatingPointError` where the run has to stop."""
        context.user_state["grad_norm"] = self.norm  # Bridge's own is 0 under FSDP without clipping
        if not self.reason:
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        context.user_state["skipped_steps"] = self.skipped
        iteration, action = context.state.train_state.step + 1, self._action()
        samples: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(samples, self.step.keys)
        if dist.get_rank() == 0:
            assert self.norm is not None
            keys = tuple(sorted({key for rank in samples for key in rank}))
            bad = BadStep(iteration, self.loss, self.norm, action, self.reason, keys)
            append_line(self.path, bad)
            print(
                f"iteration {iteration}: bad step, {self.reason}; no update "
                f"({self.in_a_row} in a row, {self.skipped} in all, samples in {self.path})",
                flush=True,
            )
        if action == "stop":
            raise FloatingPointError(
                f"{self.in_a_row} bad steps in a row up to iteration {iteration} ({self.reason}); no bad update was "
                f"made. {self.path} names the samples: look at them, lower optimizer.lr or optimizer.clip_grad, and "
                "start again from the last checkpoint"
            )

    def _action(self) -> Literal["skip", "rollback", "stop"]:
        if self.config.on_bad_steps == "stop":
            return "stop"
        if self.in_a_row < self.config.max_bad_steps:
            return "skip"
        goes_back = self.config.on_bad_steps == "rollback" and self.rollbacks < self.config.max_rollbacks
        return "rollback" if goes_back else "stop"

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.step.begin()
        if self.in_a_row >= self.config.max_bad_steps:
            self._roll_back(context)
        self.reason, self.norm = "", None

    def _roll_back(self, context: CallbackContext) -> None:
        """Load the last good checkpoint. The data goes on where it is: behind what went wrong."""
        config, manager = context.state.cfg.checkpoint, CheckpointManager.current
        manager.finalize_async_saves(context.state, blocking=True)
        saved = checkpoints.whole_iterations(manager.folder) if config.save else []
        good = [iteration for iteration in saved if self._is_good(manager.folder, iteration)]
        if not good:
            raise FloatingPointError(
                f"{self.in_a_row} bad steps in a row, and no checkpoint before them to go back to; lower optimizer.lr, "
                "or checkpoint.save_interval"
            )
        for cached in (read_run_config, read_train_state):  # theirs is the object that training has changed since
            cached.cache_clear()
        before = config.load, config.ckpt_step
        config.load, config.ckpt_step = config.save, good[-1]
        context.scheduler.num_steps = 0  # loading adds to it
        load_checkpoint(context.state, context.model, context.optimizer, context.scheduler, checkpointing_context={})
        config.load, config.ckpt_step = before
        manager.last = None
        self.rollbacks, self.in_a_row = self.rollbacks + 1, 0
        if dist.get_rank() == 0:
            print(f"rolled back to iteration {good[-1]} ({self.rollbacks} of {self.config.max_rollbacks})", flush=True)

    @staticmethod
    def _is_good(folder: Path, iteration: int) -> bool:
        """Whether it was not saved between bad steps. Those make no update, but may follow from one."""
        state = checkpoints.read_state(checkpoints.folder_of(folder, iteration))
        return bool(state.get("stability", {}).get("in_a_row", 0) == 0)
