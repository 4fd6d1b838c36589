"""Energon's metadata beside the shards: the dataset that training reads."""

from __future__ import annotations

from pathlib import Path

from tasks.artifacts import publish
from tasks.layout import newest
from tasks.stage import Target, Workspace, stage_task
from wan_core.config import IndexConfig
from wan_core.records import IndexRecord, ShardRecord, load_record


@stage_task("index")
def index_task(
    target: Target, config: IndexConfig, sharded: ShardRecord, earlier: Path | None, model: Path | None
) -> IndexRecord:
    from wan_core.data import index

    return index.run(config, sharded, target.folder, earlier, model)


def index(workspace: Workspace, config: IndexConfig, sharded: ShardRecord, model: Path | None = None) -> IndexRecord:
    """The dataset of these shards, written now or found; a model's VAE shows its latents on the card."""
    from wan_core.data import index as stage
    from wan_core.data.card import SHEET_NAME

    target = workspace.target("index", IndexRecord, stage.stage_fingerprint(config, sharded))
    earlier = None if target.refresh else newest(workspace.root, "index", workspace.name)
    record = workspace.make(index_task, target, config=config, sharded=sharded, earlier=earlier, model=model)
    if model is None or SHEET_NAME in load_record(IndexRecord, target.folder).files:
        return record
    with workspace.alone(target):  # indexed before, without a model
        record = stage.run(config, sharded, target.folder, model=model)
    publish(record)
    return record
