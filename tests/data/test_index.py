import os
from pathlib import Path

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

from tests.data.test_shards import keys, make_encoded
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
        assert all((latents == int(key[3:])).all() for key, latents in found.items())


def test_shards_are_linked_and_a_second_run_is_a_hit(sharded: ShardRecord, tmp_path: Path) -> None:
    record = index.run(IndexConfig(), sharded, tmp_path / "index")
    for name in (*sharded.shards, "empty_text.pt", "encoder.json"):
        assert os.path.samefile(sharded.path / name, record.path / name)
    assert record.fingerprint == index.stage_fingerprint(IndexConfig(workers=9), sharded)
    assert index.run(IndexConfig(workers=9), sharded, tmp_path / "index") == record


@pytest.mark.parametrize(
    "damage, sentence", [(slice(None, 9000), "9000 bytes instead"), (None, r"holds \d of 5 samples")]
)
def test_damaged_shards_are_refused(sharded: ShardRecord, tmp_path: Path, damage: slice | None, sentence: str) -> None:
    shard = sharded.path / "train-00000.tar"
    raw = shard.read_bytes()
    middle = len(raw) // 2
    shard.write_bytes(raw[damage] if damage else raw[:middle] + bytes(len(raw) - middle))
    with pytest.raises(ValueError, match=f"train-00000.tar .*{sentence}.*run shard again"):
        index.run(IndexConfig(workers=1), sharded, tmp_path / "index")
    assert not (tmp_path / "index").exists()
