"""Raw clips to the dataset that training reads."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.inputs import checked_model, checked_videos
from tasks.encode import encode
from tasks.index import index
from tasks.shard import shard
from tasks.stage import Outcome, Workspace
from wan_core.config import PipelineConfig, Stage


@flow(name="prepare-dataset", flow_run_name="{config.name}")
def prepare_dataset(
    config: PipelineConfig, videos: str, model: Path, workspace: Path, refresh: Stage | None = None
) -> list[Outcome]:
    """Encode, shard and index a folder of captioned clips.

    Args:
        config: what each stage computes; encode, shard and index are read.
        videos: folder of clips and captions, or the URL of one (s3://bucket/clips).
        model: WAN model in the Diffusers layout, whose VAE and text encoder are used.
        workspace: folder that gets one output folder per stage.
        refresh: stage to make again, with all that depends on it.
    """
    run, videos, model = Workspace(workspace, config.name, refresh), checked_videos(videos), checked_model(model)
    encoded = encode(run, config.encode, config.ray, videos, model)
    sharded = shard(run, config.shard, encoded)
    index(run, config.index, sharded, model)
    return run.outcomes
