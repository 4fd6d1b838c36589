"""The loss on held-out samples, comparable between steps, runs and layouts: the same samples, noise and noise levels.

The first samples of the val split, by key, are noised by their keys and looked at once per noise level; the loss is the
plain mean of squares over their tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ValidationConfig

from wan_core.config import check
from wan_core.parallel import Parallel
from wan_core.step import level_name
from wan_core.training_run import VALIDATION_NAME, Validation, append_line


@dataclass(kw_only=True)
class WanValidationConfig(ValidationConfig):
    """Bridge's section. `eval_interval=0` turns validation off; `eval_iters` follows from the number of samples."""

    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five equal parts of all timesteps
    max_samples: int = 256  # of the val split

    def check(self) -> None:
        """Raises `ValueError` for what cannot be validated on."""
        check(
            len(set(self.sigmas)) == len(self.sigmas) > 0 and all(0 < sigma < 1 for sigma in self.sigmas),
            f"validation.sigmas={self.sigmas} are not different noise levels between 0 and 1; choose 0.1, 0.5, 0.9",
        )
        check(self.max_samples >= 1, f"validation.max_samples={self.max_samples} is below 1; choose 256")


class ValidationLog(Callback):
    """Writes each validation to validation.jsonl and as one line to standard output; TensorBoard is Bridge's."""

    def __init__(self, config: Any, run_dir: Path) -> None:
        self.config, self.path = config, run_dir / VALIDATION_NAME
        self.since = 0.0
        self.iteration = -1  # of the last validation

    def on_eval_start(self, context: CallbackContext) -> None:
        self.since = time.perf_counter()

    def on_eval_end(self, context: CallbackContext) -> None:
        parallel = Parallel.current()
        self.iteration = context.state.train_state.step
        if not (parallel.is_last_stage and parallel.tp_rank == parallel.cp_rank == parallel.dp_rank == 0):
            return
        losses = {name: float(loss) for name, loss in (context.total_loss_dict or {}).items()}
        levels = {f"{sigma:g}": losses[level_name(sigma)] for sigma in self.config.validation.sigmas}
        result = Validation(self.iteration, losses["loss"], levels, round(time.perf_counter() - self.since, 2))
        append_line(self.path, result)
        shown = ", ".join(f"sigma {sigma} {loss:.4f}" for sigma, loss in levels.items())
        print(
            f"iteration {self.iteration} | validation loss {result.loss:.4f} | {shown} | {result.seconds:.1f} s",
            flush=True,
        )

    def on_train_end(self, context: CallbackContext) -> None:
        if self.iteration == context.state.train_state.step:
            context.state.train_state.do_valid = False  # Bridge would validate the same weights once more
