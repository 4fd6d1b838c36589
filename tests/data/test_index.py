import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)  # fmt: skip

from tests.data.test_shards import add_parts, keys, make_encoded, sample
from wan_core.config import IndexConfig, ShardConfig
from wan_core.data import index, shards
from wan_core.data.samples import SafeDecoder
from wan_core.records import ShardRecord


@edataclass
class Latents(Sample):
    latents: torch.Tensor


@stateless
def cook(sample: CrudeSample) -> Latents:
    return Latents(**basic_sample_keys(sample), latents=sample["pth"])


class Encoder(DefaultTaskEncoder):
    decoder = SafeDecoder()
    cookers = [Cooker(cook, has_subflavors={"kind": "wan"})]  # noqa: RUF012

    @stateless
    def batch(self, samples: list[Latents]) -> Latents:
        return samples[0]


@pytest.fixture
def sharded(tmp_path: Path) -> ShardRecord:
    encoded = make_encoded(tmp_path / "encode", 24)
    return shards.run(ShardConfig(val_share=0.25, test_share=0.1, max_samples=5), encoded, tmp_path / "shard")


def test_energon_reads_every_split_of_the_indexed_folder(sharded: ShardRecord, tmp_path: Path) -> None:
    record = index.run(IndexConfig(workers=1), sharded, tmp_path / "index")
    assert record.num_samples == sharded.num_samples and record.encoder == sharded.encoder
    moved = record.path.rename(tmp_path / "moved")  # nothing in it may name the place where it was written
    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    settings = dict(worker_config=worker, batch_size=1, task_encoder=Encoder())
    for split in ("train", "val", "test"):
        if split == "train":
            data = get_train_dataset(
                moved, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False, **settings
            )
        else:
            data = get_val_dataset(moved, split_part=split, **settings)
        found = {batch.__key__.split("/")[-1]: batch.latents for batch in get_loader(data)}
        assert sorted(found) == sorted(keys(sharded.path, f"{split}-*")) and len(found) == sharded.num_samples[split]
        assert all(torch.equal(latents, sample(int(key[3:])).latents) for key, latents in found.items())


def test_shards_are_linked_and_a_second_run_is_a_hit(sharded: ShardRecord, tmp_path: Path) -> None:
    record = index.run(IndexConfig(), sharded, tmp_path / "index")
    for name in (*sharded.shards, "empty_text.pt", "negative_text.pt", "encoder.json"):
        assert os.path.samefile(sharded.path / name, record.path / name)
    assert record.fingerprint == index.stage_fingerprint(IndexConfig(workers=9), sharded)
    assert index.run(IndexConfig(workers=9), sharded, tmp_path / "index") == record


def metadata(folder: Path) -> dict[str, Any]:
    """All that Energon wrote, without the order of its database's rows."""
    meta = folder / ".nv-meta"
    with sqlite3.connect(meta / "index.sqlite") as index:
        found: dict[str, Any] = {t: sorted(index.execute(f"SELECT * FROM {t}")) for t in ("samples", "sample_parts")}
        found["schema"] = sorted(map(str, index.execute("SELECT sql FROM sqlite_master")))
    found |= {name: (meta / name).read_text() for name in (".info.json", "split.yaml", "dataset.yaml")}
    return found | {path.name: path.read_bytes() for path in folder.glob("*.idx")}


def test_of_a_grown_dataset_only_the_new_shards_are_read(tmp_path: Path) -> None:
    config, quick = ShardConfig(val_share=0.1, max_samples=6), IndexConfig(workers=1)
    encoded = make_encoded(tmp_path / "encode", 40)
    before = shards.run(config, encoded, tmp_path / "before")
    index.run(quick, before, tmp_path / "index")
    after = shards.run(config, add_parts(tmp_path / "encode", [range(40, 42)]), tmp_path / "after", before.path)
    index.run(quick, after, tmp_path / "whole")
    kept = [n for n in after.shards if n in before.shards and os.path.samefile(before.path / n, after.path / n)]
    assert len(kept) > len(after.shards) / 2
    for name in set(kept) - {min(after.shards)}:  # whoever reads them now finds no sample; the card reads the first
        (after.path / name).write_bytes(bytes(after.files[name]))
    index.run(quick, after, tmp_path / "grown", earlier=tmp_path / "index")
    assert metadata(tmp_path / "grown") == metadata(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has no samples.*run shard again"):
        index.run(quick, after, tmp_path / "again")
    index.run(quick, before, tmp_path / "shrunk", earlier=tmp_path / "grown")
    assert metadata(tmp_path / "shrunk") == metadata(tmp_path / "index")


def test_nothing_new_to_read(sharded: ShardRecord, tmp_path: Path) -> None:
    first = index.run(IndexConfig(workers=1), sharded, tmp_path / "index")
    again = index.run(IndexConfig(workers=1), sharded, tmp_path / "again", earlier=first.path)
    assert metadata(again.path) == metadata(first.path)
    assert json.loads((again.path / ".nv-meta" / ".info.json").read_text())["shard_counts"] == sharded.shards


@pytest.mark.parametrize(
    "damage, sentence", [(slice(None, 9000), "9000 bytes instead"), (None, r"holds \d of \d samples")]
)
def test_damaged_shards_are_refused(sharded: ShardRecord, tmp_path: Path, damage: slice | None, sentence: str) -> None:
    name = next(iter(sharded.shards))
    shard = sharded.path / name
    raw = shard.read_bytes()
    middle = len(raw) // 2
    shard.write_bytes(raw[damage] if damage else raw[:middle] + bytes(len(raw) - middle))
    with pytest.raises(ValueError, match=f"{name} .*{sentence}.*run shard again"):
        index.run(IndexConfig(workers=1), sharded, tmp_path / "index")
    assert not (tmp_path / "index").exists()
