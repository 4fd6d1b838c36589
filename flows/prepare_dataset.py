"""Raw clips to the dataset that training reads."""

from __future__ import annotations

from pathlib import Path

from flows.flow import wan_flow
from flows.inputs import checked_model, checked_videos
from tasks.encode import encode
from tasks.index import index
from tasks.shard import shard
from tasks.stage import Outcome, Workspace
from wan_core.config import PipelineConfig, Stage


@wan_flow("prepare-dataset")
def prepare_dataset(
    config: PipelineConfig, videos: str, model: Path, workspace: Path, refresh: Stage | None = None
) -> list[Outcome]:
    """Encode, shard and index a folder of captioned clips with the VAE and the text encoder of a model."""
    run, videos, model = Workspace(workspace, config.name, refresh), checked_videos(videos), checked_model(model)
    encoded = encode(run, config.encode, config.ray, videos, model)
    sharded = shard(run, config.shard, encoded)
    index(run, config.index, sharded, model)
    return run.outcomes
