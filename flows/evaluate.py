"""A finished training run to its model folder, samples, metrics and report."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.inputs import checked_model, given_or_newest
from tasks.convert import convert
from tasks.evaluate import evaluate
from tasks.sample import sample
from tasks.stage import Outcome, Workspace
from wan_core.config import PipelineConfig, Stage
from wan_core.records import EncodeRecord, TrainRecord


@flow(name="evaluate-run", flow_run_name="{config.name}")
def evaluate_run(
    config: PipelineConfig,
    model: Path,
    workspace: Path,
    trained: Path | None = None,
    encoded: Path | None = None,
    refresh: Stage | None = None,
) -> list[Outcome]:
    """Convert the checkpoint of a training run, sample from it and evaluate the samples.

    Args:
        config: what each stage computes; convert, sample and evaluate are read.
        model: WAN model in the Diffusers layout, for everything but the transformer.
        workspace: folder that gets one output folder per stage.
        trained: run folder of train; the workspace's newest of this name if not given.
        encoded: output folder of encode; the workspace's newest of this name if not given.
        refresh: stage to make again, with all that depends on it.
    """
    run, model = Workspace(workspace, config.name, refresh), checked_model(model)
    training = given_or_newest(TrainRecord, "train", workspace, config.name, trained)
    clips = given_or_newest(EncodeRecord, "encode", workspace, config.name, encoded)
    converted = convert(run, config.convert, training, model)
    sampled = sample(run, config.sample, converted)
    evaluate(run, config.evaluate, sampled, training, clips)
    return run.outcomes
