"""index: Energon's metadata beside the shards, written without asking anything, and a card that shows what is in them.

<output_dir>/.nv-meta/           what `megatron.energon.get_train_dataset` reads
             <shard>.tar.idx     offsets of the samples
             card.md             the dataset card (data/card.py), with histograms.png and contact_sheet.png
             record.json         IndexRecord, written last
             ...                 all files of the shard stage, hard-linked
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from megatron import energon
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.flavors.webdataset.config import (
    INDEX_SQLITE_FILENAME,
    INDEX_UUID_FILENAME,
    INFO_JSON_FILENAME,
    SPLIT_YAML_FILENAME,
)  # fmt: skip
from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX

from wan_core import records
from wan_core.config import IndexConfig, check
from wan_core.data import card
from wan_core.output import link, list_files, writing
from wan_core.records import IndexRecord, ShardRecord

if TYPE_CHECKING:
    from wan_core.encode.vae import Vae

REMEDY = "it is damaged: delete its folder and run shard again"
META_FOLDER = ".nv-meta"
TABLES = {  # of Energon's index.sqlite
    "samples": "sample_key, sample_index, byte_offset, byte_size",
    "sample_parts": "sample_index, part_name, content_byte_offset, content_byte_size",
}
DATASET = {
    "__module__": "megatron.energon",
    "__class__": "CrudeWebdataset",
    "subflavors": {"kind": "wan"},  # what the task encoder's cooker asks for
}


def stage_fingerprint(config: IndexConfig, sharded: ShardRecord) -> str:
    return records.fingerprint("index", config, shard=sharded.fingerprint)


def run(
    config: IndexConfig, sharded: ShardRecord, output_dir: Path, earlier: Path | None = None, model: Path | None = None
) -> IndexRecord:
    """Link the shards into a folder and index them there.

    Args:
        earlier: an output of this stage; what it knows of shards that it shares is taken over, and only the others are
            read. `output_dir` may be one, too.
        model: Diffusers folder whose VAE made the latents; with it the card shows pictures, also of an output that
            was made without.

    Raises:
        ValueError: a shard has another size, or holds another number of samples, than when it was written; or the model
            has another VAE.
    """
    wanted = stage_fingerprint(config, sharded)
    if found := records.find_record(IndexRecord, output_dir, wanted):
        return found if model is None or card.SHEET_NAME in found.files else with_pictures(found, sharded, model)
    for name, size in sharded.files.items():
        found_size = (sharded.path / name).stat().st_size
        if found_size != size:
            raise ValueError(f"{sharded.path / name} has {found_size} bytes instead of {size}; {REMEDY}")
    earlier, vae = earlier or output_dir, load_matching_vae(model, sharded) if model else None
    with writing("index", output_dir, config, wanted) as output:
        for name in sharded.files:
            link(sharded.path / name, output.path / name)
        prepare(config, sharded, output.path, earlier)
        card.write(output.path, output_dir.name, sharded.encoder, vae)
        return output.finish(IndexRecord, num_samples=sharded.num_samples, encoder=sharded.encoder)


def with_pictures(record: IndexRecord, sharded: ShardRecord, model: Path) -> IndexRecord:
    """Write the card of a whole output again, with clips."""
    vae, kept = load_matching_vae(model, sharded), {n: s for n, s in record.files.items() if n not in card.NAMES}
    records.save_record(replace(record, files=kept), record.path)  # whole without a card, should this be interrupted
    card.write(record.path, record.path.name, record.encoder, vae)
    record = replace(record, files=list_files(record.path))
    records.save_record(record, record.path)
    return record


def load_matching_vae(model: Path, sharded: ShardRecord) -> Vae:
    """The VAE that made the latents, on the GPU if there is one."""
    import torch

    from wan_core.digests import encoder_identity
    from wan_core.encode.vae import load_vae

    check(
        encoder_identity(model)["vae_digest"] == sharded.encoder["vae_digest"],
        f"{sharded.path} was encoded with another VAE than {model} has; give the model that it was encoded with",
    )
    return load_vae(model, "float32", "cuda" if torch.cuda.is_available() else "cpu")


def prepare(config: IndexConfig, sharded: ShardRecord, folder: Path, earlier: Path) -> None:
    """Write Energon's metadata of the shards in a folder: `energon prepare`, without its questions."""
    names, meta = sorted(sharded.shards), folder / META_FOLDER
    known = shared_shards(names, folder, earlier)
    new = [name for name in names if name not in known]
    meta.mkdir()
    counts = {name: known[name] for name in known}
    if new:
        try:
            BaseWebdatasetFactory.prepare_dataset(
                folder, new, split_parts_patterns=[("new", ".*")], shuffle_seed=None, workers=config.workers
            )
        except AssertionError as error:  # a shard without any sample
            raise ValueError(f"{sharded.path}: {error} {REMEDY.capitalize()}") from error
        counts |= json.loads((meta / INFO_JSON_FILENAME).read_text())["shard_counts"]
    for name, expected in sharded.shards.items():
        if counts.get(name, 0) != expected:  # Energon indexes what it can read of a damaged shard and says nothing
            raise ValueError(f"{sharded.path / name} holds {counts.get(name, 0)} of {expected} samples; {REMEDY}")
    for name in known:
        link(tar_index(earlier / name), tar_index(folder / name))
    if known:
        add_known(folder, names, new, earlier)
    info = {"energon_version": energon.__version__, "shard_counts": {name: counts[name] for name in names}}
    (meta / INFO_JSON_FILENAME).write_text(json.dumps(info, indent=2))
    splits = {split: [name for name in names if name.startswith(f"{split}-")] for split in sharded.num_samples}
    (meta / SPLIT_YAML_FILENAME).write_text(yaml.safe_dump({"split_parts": splits, "exclude": []}))
    (meta / INDEX_UUID_FILENAME).write_text(str(uuid.uuid4()))
    (meta / "dataset.yaml").write_text(yaml.safe_dump(DATASET))


def shared_shards(names: list[str], folder: Path, earlier: Path) -> dict[str, int]:
    """The shards that an earlier output holds as the very same files, and their numbers of samples."""
    info = earlier / META_FOLDER / INFO_JSON_FILENAME
    if not (earlier / records.RECORD_NAME).is_file() or not info.is_file():
        return {}
    values = json.loads(info.read_text())
    if values["energon_version"] != energon.__version__:
        return {}
    counts = values["shard_counts"]
    same = (n for n in names if n in counts and tar_index(earlier / n).is_file() and (earlier / n).is_file())
    return {name: counts[name] for name in same if os.path.samefile(earlier / name, folder / name)}


def tar_index(shard: Path) -> Path:
    return shard.with_suffix(ITAR_SUFFIX)


def add_known(folder: Path, names: list[str], new: list[str], earlier: Path) -> None:
    """Complete the database of the new shards with an earlier one's rows; a shard's number is its place in `names`."""
    path, old = (place / META_FOLDER / INDEX_SQLITE_FILENAME for place in (folder, earlier))
    if not new:
        SqliteIndexWriter(EPath(path)).close()  # the tables
    before = list(json.loads((earlier / META_FOLDER / INFO_JSON_FILENAME).read_text())["shard_counts"])
    place = {name: number for number, name in enumerate(names)}
    known = [(number, place[name]) for number, name in enumerate(before) if name in place and name not in new]
    with contextlib.closing(sqlite3.connect(path)) as index:
        index.execute("ATTACH ? AS earlier", (str(old),))
        index.execute("CREATE TEMP TABLE moved (old INTEGER PRIMARY KEY, new INTEGER)")
        index.executemany("INSERT INTO moved VALUES (?, ?)", [(number, place[name]) for number, name in enumerate(new)])
        for table in ("samples", "sample_parts"):
            index.execute(f"UPDATE {table} SET tar_file_id = (SELECT new FROM moved WHERE old = tar_file_id)")
        index.execute("DELETE FROM moved")
        index.executemany("INSERT INTO moved VALUES (?, ?)", known)
        for table, columns in TABLES.items():
            index.execute(
                f"INSERT INTO {table} (tar_file_id, {columns}) "
                f"SELECT new, {columns} FROM earlier.{table} JOIN moved ON tar_file_id = old"
            )
        index.commit()
