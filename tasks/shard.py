"""Encoded parts to shuffled WebDataset shards."""

from __future__ import annotations

from pathlib import Path

from tasks.layout import newest
from tasks.stage import Target, Workspace, stage_task
from wan_core.config import ShardConfig
from wan_core.records import EncodeRecord, ShardRecord


@stage_task("shard")
def shard_task(target: Target, config: ShardConfig, encoded: EncodeRecord, earlier: Path | None) -> ShardRecord:
    from wan_core.data import shards

    return shards.run(config, encoded, target.folder, earlier)


def shard(workspace: Workspace, config: ShardConfig, encoded: EncodeRecord) -> ShardRecord:
    """The shards of these parts, written now or found."""
    from wan_core.data import shards

    target = workspace.target("shard", ShardRecord, shards.stage_fingerprint(config, encoded))
    earlier = None if target.refresh else newest(workspace.root, "shard", workspace.name)
    return workspace.make(shard_task, target, config=config, encoded=encoded, earlier=earlier)
