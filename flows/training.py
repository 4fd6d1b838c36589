"""A dataset to a trained model, from random weights or from those of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from flows.flow import wan_flow
from flows.inputs import check_training, checked_model, given_or_newest
from tasks.convert import convert
from tasks.stage import Outcome, Workspace
from tasks.train import train
from wan_core.config import PipelineConfig, Stage
from wan_core.records import IndexRecord


def train_and_convert(
    mode: Literal["pretrain", "finetune"], config: PipelineConfig, model: Path, run: Workspace, dataset: Path | None
) -> list[Outcome]:
    """The body of both flows: `mode` replaces the config's own."""
    model = checked_model(model)
    check_training(config.train, config.launch, model)
    indexed = given_or_newest(IndexRecord, "index", run.root, config.name, dataset)
    trained = train(run, replace(config.train, mode=mode), indexed, model, config.launch, config.ray)
    convert(run, config.convert, trained, model)
    return run.outcomes


@wan_flow("pretrain")
def pretrain(
    config: PipelineConfig, model: Path, workspace: Path, dataset: Path | None = None, refresh: Stage | None = None
) -> list[Outcome]:
    """Train from random weights, in the architecture of a model, and export the result as a Diffusers folder."""
    return train_and_convert("pretrain", config, model, Workspace(workspace, config.name, refresh), dataset)


@wan_flow("finetune")
def finetune(
    config: PipelineConfig, model: Path, workspace: Path, dataset: Path | None = None, refresh: Stage | None = None
) -> list[Outcome]:
    """Fine-tune the weights of a model and export the result as a Diffusers folder."""
    return train_and_convert("finetune", config, model, Workspace(workspace, config.name, refresh), dataset)
