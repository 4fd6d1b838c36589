"""Every stage as a flow of its own, to be deployed and run alone.

An input that is not given is the newest output of the stage before it, of the same name, in the workspace.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

import tasks.convert
import tasks.encode
import tasks.evaluate
import tasks.index
import tasks.sample
import tasks.shard
import tasks.train
from flows.inputs import checked_model, checked_videos, given_or_newest
from tasks.stage import Outcome, Workspace
from wan_core.config import (
    ConvertConfig,
    EncodeConfig,
    EvaluateConfig,
    IndexConfig,
    LaunchConfig,
    RayConfig,
    SampleConfig,
    ShardConfig,
    TrainConfig,
)
from wan_core.records import ConvertRecord, EncodeRecord, IndexRecord, SampleRecord, ShardRecord, TrainRecord


@flow(name="encode", flow_run_name="{name}")
def encode(
    config: EncodeConfig, ray: RayConfig, name: str, videos: str, model: Path, workspace: Path, refresh: bool = False
) -> list[Outcome]:
    """Clips and captions to latents and text embeddings."""
    run, videos, model = (
        Workspace(workspace, name, "encode" if refresh else None),
        checked_videos(videos),
        checked_model(model),
    )
    tasks.encode.encode(run, config, ray, videos, model)
    return run.outcomes


@flow(name="shard", flow_run_name="{name}")
def shard(
    config: ShardConfig, name: str, workspace: Path, encoded: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Encoded parts to shuffled WebDataset shards."""
    run = Workspace(workspace, name, "shard" if refresh else None)
    tasks.shard.shard(run, config, given_or_newest(EncodeRecord, "encode", workspace, name, encoded))
    return run.outcomes


@flow(name="index", flow_run_name="{name}")
def index(
    config: IndexConfig, name: str, workspace: Path, sharded: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Energon metadata beside the shards."""
    run = Workspace(workspace, name, "index" if refresh else None)
    tasks.index.index(run, config, given_or_newest(ShardRecord, "shard", workspace, name, sharded))
    return run.outcomes


@flow(name="train", flow_run_name="{name}")
def train(
    config: TrainConfig,
    launch: LaunchConfig,
    ray: RayConfig,
    name: str,
    model: Path,
    workspace: Path,
    dataset: Path | None = None,
    refresh: bool = False,
) -> list[Outcome]:
    """One training run under torchrun."""
    run, model = Workspace(workspace, name, "train" if refresh else None), checked_model(model)
    indexed = given_or_newest(IndexRecord, "index", workspace, name, dataset)
    tasks.train.train(run, config, indexed, model, launch, ray)
    return run.outcomes


@flow(name="convert", flow_run_name="{name}")
def convert(
    config: ConvertConfig, name: str, model: Path, workspace: Path, trained: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Megatron checkpoint to a Diffusers folder."""
    run, model = Workspace(workspace, name, "convert" if refresh else None), checked_model(model)
    tasks.convert.convert(run, config, given_or_newest(TrainRecord, "train", workspace, name, trained), model)
    return run.outcomes


@flow(name="sample", flow_run_name="{name}")
def sample(
    config: SampleConfig, name: str, workspace: Path, model: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Videos from prompts. `model`: any Diffusers folder; the workspace's newest converted one if not given."""
    run = Workspace(workspace, name, "sample" if refresh else None)
    folder = checked_model(model) if model else given_or_newest(ConvertRecord, "convert", workspace, name, None)
    tasks.sample.sample(run, config, folder)
    return run.outcomes


@flow(name="evaluate", flow_run_name="{name}")
def evaluate(
    config: EvaluateConfig,
    name: str,
    workspace: Path,
    sampled: Path | None = None,
    trained: Path | None = None,
    encoded: Path | None = None,
    refresh: bool = False,
) -> list[Outcome]:
    """Metrics and report over samples, training and data."""
    run = Workspace(workspace, name, "evaluate" if refresh else None)
    tasks.evaluate.evaluate(
        run,
        config,
        given_or_newest(SampleRecord, "sample", workspace, name, sampled),
        given_or_newest(TrainRecord, "train", workspace, name, trained),
        given_or_newest(EncodeRecord, "encode", workspace, name, encoded),
    )
    return run.outcomes
