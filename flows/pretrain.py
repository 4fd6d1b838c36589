"""A dataset to a model trained from random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.inputs import checked_model, given_or_newest
from tasks.convert import convert
from tasks.stage import Outcome, Workspace
from tasks.train import train
from wan_core.config import PipelineConfig, Stage
from wan_core.records import IndexRecord


@flow(name="pretrain", flow_run_name="{config.name}")
def pretrain(
    config: PipelineConfig, model: Path, workspace: Path, dataset: Path | None = None, refresh: Stage | None = None
) -> list[Outcome]:
    """Train from random weights and export the result as a Diffusers folder.

    Args:
        config: what each stage computes; train (whose mode is set here) and convert are read.
        model: WAN model in the Diffusers layout, gives the architecture, and all but the transformer of the result.
        workspace: folder that gets one output folder per stage.
        dataset: output folder of index; the workspace's newest of this name if not given.
        refresh: stage to make again, with all that depends on it.
    """
    run, model = Workspace(workspace, config.name, refresh), checked_model(model)
    indexed = given_or_newest(IndexRecord, "index", workspace, config.name, dataset)
    trained = train(run, replace(config.train, mode="pretrain"), indexed, model, config.launch, config.ray)
    convert(run, config.convert, trained, model)
    return run.outcomes
