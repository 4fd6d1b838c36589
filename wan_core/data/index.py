"""index: Energon's metadata beside the shards, written without asking anything."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import yaml
from megatron.energon.flavors import BaseWebdatasetFactory

from wan_core import records
from wan_core.config import IndexConfig
from wan_core.records import IndexRecord, ShardRecord

REMEDY = "it is damaged: delete its folder and run shard again"
META_FOLDER = ".nv-meta"
DATASET = {
    "__module__": "megatron.energon",
    "__class__": "CrudeWebdataset",
    "subflavors": {"kind": "wan"},  # what the task encoder's cooker asks for
}


def stage_fingerprint(config: IndexConfig, sharded: ShardRecord) -> str:
    return records.fingerprint("index", config, shard=sharded.fingerprint)


def run(config: IndexConfig, sharded: ShardRecord, output_dir: Path) -> IndexRecord:
    """Link the shards into a folder and index them there.

    Raises:
        ValueError: a shard has another size, or holds another number of samples, than when it was written.
    """
    wanted = stage_fingerprint(config, sharded)
    if found := records.find_record(IndexRecord, output_dir, wanted):
        return found
    for name, size in sharded.files.items():
        found_size = (sharded.path / name).stat().st_size
        if found_size != size:
            raise ValueError(f"{sharded.path / name} has {found_size} bytes instead of {size}; {REMEDY}")
    with records.writing("index", output_dir, config, wanted) as output:
        for name in sharded.files:
            _link(sharded.path / name, output.path / name)
        _prepare(config, sharded, output.path)
        return output.finish(IndexRecord, num_samples=sharded.num_samples, encoder=sharded.encoder)


def _prepare(config: IndexConfig, sharded: ShardRecord, folder: Path) -> None:
    names = sorted(sharded.shards)
    # One pattern per split: of two with the same name Energon keeps the second.
    patterns = [
        (split, "|".join(re.escape(name) for name in names if name.startswith(f"{split}-")))
        for split in sharded.num_samples
    ]
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_patterns=patterns, shuffle_seed=None, workers=config.workers
    )
    (folder / META_FOLDER / "dataset.yaml").write_text(yaml.safe_dump(DATASET))
    counted = json.loads((folder / META_FOLDER / ".info.json").read_text())["shard_counts"]
    wrong = {name: (counted.get(name, 0), n) for name, n in sharded.shards.items() if counted.get(name, 0) != n}
    if wrong:  # Energon indexes what it can read of a damaged shard and says nothing
        name, (found, expected) = next(iter(wrong.items()))
        raise ValueError(f"{sharded.path / name} holds {found} of {expected} samples; {REMEDY}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without hard links
        shutil.copyfile(source, target)
