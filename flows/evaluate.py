"""A finished training run to its model folder, samples, metrics and report."""

from __future__ import annotations

from pathlib import Path

from flows.flow import wan_flow
from flows.inputs import check_images, checked_model, given_or_newest
from tasks.convert import convert
from tasks.evaluate import evaluate
from tasks.sample import sample
from tasks.stage import Outcome, Workspace
from wan_core.config import PipelineConfig, Stage
from wan_core.records import EncodeRecord, TrainRecord


@wan_flow("evaluate-run")
def evaluate_run(
    config: PipelineConfig,
    model: Path,
    workspace: Path,
    trained: Path | None = None,
    encoded: Path | None = None,
    refresh: Stage | None = None,
) -> list[Outcome]:
    """Convert the checkpoint of a training run, sample from it and evaluate the samples."""
    run, model = Workspace(workspace, config.name, refresh), checked_model(model)
    check_images(config.sample, model)
    training = given_or_newest(TrainRecord, "train", workspace, config.name, trained)
    clips = given_or_newest(EncodeRecord, "encode", workspace, config.name, encoded)
    converted = convert(run, config.convert, training, model)
    sampled = sample(run, config.sample, converted)
    evaluate(run, config.evaluate, sampled, training, clips)
    return run.outcomes
