"""Training under torchrun, in its own processes, watched through the run folder's metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from tasks.artifacts import LivePage, loss_plot
from tasks.errors import LaunchError
from tasks.launch import launch
from tasks.progress import Progress
from tasks.stage import Target, Workspace, stage_task
from tasks.workers import ray_session
from wan_core.checkpoints import latest
from wan_core.config import LaunchConfig, RayConfig, TrainConfig
from wan_core.records import IndexRecord, TrainRecord, load_record

RESTART_SECONDS = 5.0  # for Ray or a file system to notice what was lost
PLOT_SECONDS = 60.0  # between two pictures of the loss curve, each about 100 KB


class Metrics:
    """Follows metrics.jsonl, which rank 0 appends to: its last line is the progress, all of it a picture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0  # a resumed run: what is old is not news
        self.progress: Progress | None = None
        self.page = LivePage("train-loss", f"loss of {path.parent.name}")
        self.plotted = time.monotonic()

    def tick(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.offset:  # written anew
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return
        self.offset += len(whole) + 1
        self.report(json.loads(whole.splitlines()[-1]))

    def report(self, step: dict[str, Any]) -> None:
        if self.progress is None:
            self.progress = Progress("train", step["train_iters"], "iterations")
        text = f"loss {step['loss']:.4f}, {step['step_seconds']:.2f} s/step, {step['tokens_per_second']:.0f} tokens/s"
        self.progress.report(step["iteration"], text)
        if time.monotonic() - self.plotted > PLOT_SECONDS:
            self.plot()

    def plot(self) -> None:
        """Show the curve so far; the stage's own page replaces it at the end."""
        self.plotted = time.monotonic()
        self.page.show(f"## {self.path.parent.name}, still training\n{loss_plot(self.path)}")


@stage_task("train")  # an attempt resumes from the last checkpoint
def train_task(
    target: Target, config: TrainConfig, dataset: Path, model: Path, launch_config: LaunchConfig, ray_config: RayConfig
) -> TrainRecord:
    """Train until `train_iters` is reached; rank 0 writes the record.

    A failure that may pass is a retry of the task only if no checkpoint was saved before it: a run of weeks loses more
    ranks than a task has retries.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    logger, metrics = get_run_logger(), Metrics(target.folder / "metrics.jsonl")
    arguments = [
        "wan_core.train", "--recipe", config.recipe, "--training-mode", config.mode, "--model", str(model),
        "--dataset", str(dataset), "--run-dir", str(target.folder), *config.overrides,
    ]  # fmt: skip

    def run() -> None:
        while True:
            before = latest(target.folder / "checkpoints")
            try:
                return launch(
                    launch_config, arguments, target.folder / "logs", lambda line: log(logger, line), metrics.tick
                )
            except LaunchError as error:
                if not error.retry or latest(target.folder / "checkpoints") == before:
                    raise
                logger.warning("The training goes on from its last checkpoint, after this: %s", error)
                time.sleep(RESTART_SECONDS)

    with ray_session(ray_config) if launch_config.launcher == "ray" else contextlib.nullcontext():
        run()
    return load_record(TrainRecord, target.folder)


def log(logger: logging.Logger | logging.LoggerAdapter[Any], line: str) -> None:
    if line.strip():
        logger.info(line)


def train(
    workspace: Workspace, config: TrainConfig, dataset: IndexRecord, model: Path, launch: LaunchConfig, ray: RayConfig
) -> TrainRecord:
    """The trained run, finished now, resumed or found."""
    from wan_core.training_run import fingerprints

    folder, wanted = fingerprints(config, dataset.path, model)
    target = workspace.target("train", TrainRecord, wanted, workspace.folder("train", folder))
    found = target.find() and not target.refresh
    # Runs that differ in what resuming may change, as train_iters, share the folder but no key of Prefect's lock.
    with contextlib.nullcontext() if found else workspace.alone(target):
        return workspace.make(
            train_task, target, config=config, dataset=dataset.path, model=model, launch_config=launch, ray_config=ray
        )
