"""New clips to a model that is fine-tuned on, and promoted only if it is better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import prefect.runtime.flow_run
from prefect.states import Completed, State

from flows.flow import wan_flow
from flows.inputs import check_images, check_training, checked_model, checked_videos
from tasks.artifacts import publish_validation
from tasks.convert import convert
from tasks.encode import encode
from tasks.index import index
from tasks.promoted import decide, load_promoted, save_promoted
from tasks.sample import sample
from tasks.shard import shard
from tasks.stage import Outcome, Workspace
from tasks.train import train
from tasks.validate import validate
from wan_core.config import PipelineConfig


@wan_flow("nightly-finetune")
def nightly_finetune(config: PipelineConfig, videos: str, model: Path, workspace: Path) -> list[Outcome] | State[Any]:
    """Encode what is new, fine-tune the latest good model on all clips, and promote the result if its loss on held-out
    clips is lower. Without new clips the run ends as Skipped. The first night starts from `model`.
    """
    run, videos, model = Workspace(workspace, config.name), checked_videos(videos), checked_model(model)
    check_images(config.sample, model)
    check_training(config.train, config.launch, model)
    good = load_promoted(run.root, config.name)
    encoded = encode(run, config.encode, config.ray, videos, model)
    sharded = shard(run, config.shard, encoded)
    indexed = index(run, config.index, sharded, model)
    this_night = str(prefect.runtime.flow_run.id)
    if good is None or good.dataset != indexed.fingerprint:
        start = good.model if good else model
        before = validate(start, indexed)
        trained = train(run, replace(config.train, mode="finetune"), indexed, start, config.launch, config.ray)
        candidate = convert(run, config.convert, trained, start).path
        after = validate(candidate, indexed)
        publish_validation(start, before, candidate, after)
        good = decide(good, indexed.fingerprint, this_night, (start, before.loss), (candidate, after.loss))
        save_promoted(run.root, config.name, good)
    elif good.flow_run != this_night:  # else this is a later attempt, which goes on from the decision
        return Completed(name="Skipped", message=f"no new clips below {videos}")
    if config.sample.prompts:  # last: a promotion does not hang on it
        sample(run, config.sample, good.candidate)
    return Completed(
        name="Promoted" if good.better else "NotPromoted",
        message=f"validation loss {good.start_loss:.4f} -> {good.candidate_loss:.4f}; {good.model} is in use",
    )
