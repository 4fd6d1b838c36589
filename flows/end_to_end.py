"""Raw clips to a trained, converted, sampled and evaluated model."""

from __future__ import annotations

from pathlib import Path

from flows.flow import wan_flow
from flows.inputs import check_images, check_training, checked_model, checked_videos
from tasks.convert import convert
from tasks.encode import encode
from tasks.evaluate import evaluate
from tasks.index import index
from tasks.sample import sample
from tasks.shard import shard
from tasks.stage import Outcome, Workspace
from tasks.train import train
from wan_core.config import PipelineConfig, Stage


@wan_flow("end-to-end")
def end_to_end(
    config: PipelineConfig, videos: str, model: Path, workspace: Path, refresh: Stage | None = None
) -> list[Outcome]:
    """All seven stages; those whose output is there already are found, not run."""
    run, videos, model = Workspace(workspace, config.name, refresh), checked_videos(videos), checked_model(model)
    check_images(config.sample, model)
    check_training(config.train, config.launch, model)
    encoded = encode(run, config.encode, config.ray, videos, model)
    sharded = shard(run, config.shard, encoded)
    indexed = index(run, config.index, sharded, model)
    trained = train(run, config.train, indexed, model, config.launch, config.ray)
    converted = convert(run, config.convert, trained, model)
    sampled = sample(run, config.sample, converted)
    evaluate(run, config.evaluate, sampled, trained, encoded)
    return run.outcomes
