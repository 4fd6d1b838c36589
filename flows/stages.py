"""Every stage as a flow of its own, to be deployed and run alone.

An input that is not given is the newest output of the stage before it, of the same name, in the workspace. Prefect
writes its form from these signatures, so they are spelt out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tasks.convert
import tasks.encode
import tasks.evaluate
import tasks.index
import tasks.sample
import tasks.shard
import tasks.train
from flows.flow import wan_flow
from flows.inputs import check_training, checked_model, checked_videos, given_or_newest
from flows.parameters import SAMPLE_PARAMETERS, STAGE_PARAMETERS
from tasks.stage import Outcome, Workspace
from wan_core.config import (
    ConvertConfig,
    EncodeConfig,
    EvaluateConfig,
    IndexConfig,
    LaunchConfig,
    Name,
    RayConfig,
    SampleConfig,
    ShardConfig,
    TrainConfig,
)
from wan_core.records import ConvertRecord, EncodeRecord, IndexRecord, SampleRecord, ShardRecord, TrainRecord

stage_flow = partial(wan_flow, run_name="{name}", texts=STAGE_PARAMETERS)


@stage_flow("encode")
def encode(
    config: EncodeConfig, ray: RayConfig, name: Name, videos: str, model: Path, workspace: Path, refresh: bool = False
) -> list[Outcome]:
    """Clips and captions to latents and text embeddings."""
    run = Workspace(workspace, name, "encode" if refresh else None)
    tasks.encode.encode(run, config, ray, checked_videos(videos), checked_model(model))
    return run.outcomes


@stage_flow("shard")
def shard(
    config: ShardConfig, name: Name, workspace: Path, encoded: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Encoded parts to shuffled WebDataset shards."""
    run = Workspace(workspace, name, "shard" if refresh else None)
    tasks.shard.shard(run, config, given_or_newest(EncodeRecord, "encode", workspace, name, encoded))
    return run.outcomes


@stage_flow("index")
def index(
    config: IndexConfig,
    name: Name,
    workspace: Path,
    sharded: Path | None = None,
    model: Path | None = None,
    refresh: bool = False,
) -> list[Outcome]:
    """Energon metadata beside the shards; with a model the dataset card shows clips."""
    run, model = Workspace(workspace, name, "index" if refresh else None), checked_model(model) if model else None
    tasks.index.index(run, config, given_or_newest(ShardRecord, "shard", workspace, name, sharded), model)
    return run.outcomes


@stage_flow("train")
def train(
    config: TrainConfig,
    launch: LaunchConfig,
    ray: RayConfig,
    name: Name,
    model: Path,
    workspace: Path,
    dataset: Path | None = None,
    refresh: bool = False,
) -> list[Outcome]:
    """One training run under torchrun."""
    run, model = Workspace(workspace, name, "train" if refresh else None), checked_model(model)
    check_training(config, launch, model)
    indexed = given_or_newest(IndexRecord, "index", workspace, name, dataset)
    tasks.train.train(run, config, indexed, model, launch, ray)
    return run.outcomes


@stage_flow("convert")
def convert(
    config: ConvertConfig, name: Name, model: Path, workspace: Path, trained: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Megatron checkpoint to a Diffusers folder."""
    run, model = Workspace(workspace, name, "convert" if refresh else None), checked_model(model)
    tasks.convert.convert(run, config, given_or_newest(TrainRecord, "train", workspace, name, trained), model)
    return run.outcomes


@stage_flow("sample", texts=SAMPLE_PARAMETERS)
def sample(
    config: SampleConfig, name: Name, workspace: Path, model: Path | None = None, refresh: bool = False
) -> list[Outcome]:
    """Videos from prompts."""
    run = Workspace(workspace, name, "sample" if refresh else None)
    newest = partial(given_or_newest, ConvertRecord, "convert", workspace, name, None)
    tasks.sample.sample(run, config, checked_model(model) if model else newest())
    return run.outcomes


@stage_flow("evaluate")
def evaluate(
    config: EvaluateConfig,
    name: Name,
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
