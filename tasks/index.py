"""Energon's metadata beside the shards: the dataset that training reads."""

from __future__ import annotations

from pathlib import Path

from tasks.layout import newest
from tasks.stage import Target, Workspace, stage_task
from wan_core.config import IndexConfig
from wan_core.records import IndexRecord, ShardRecord


@stage_task("index")
def index_task(
    target: Target, config: IndexConfig, sharded: ShardRecord, earlier: Path | None, model: Path | None
) -> IndexRecord:
    from wan_core.data import index

    return index.run(config, sharded, target.folder, earlier, model)


def index(workspace: Workspace, config: IndexConfig, sharded: ShardRecord, model: Path | None = None) -> IndexRecord:
    """The dataset of these shards, written now or found; a model's VAE shows its latents on the card."""
    from wan_core.data import index as stage

    target = workspace.target("index", IndexRecord, stage.stage_fingerprint(config, sharded))
    earlier = None if target.refresh else newest(workspace.root, "index", workspace.name)
    return workspace.make(index_task, target, config=config, sharded=sharded, earlier=earlier, model=model)
