import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

from tests.data.test_index import Encoder
from tests.data.test_shards import add_parts
from wan_core.config import IndexConfig, ShardConfig
from wan_core.data import blend, index, shards
from wan_core.records import IndexRecord


@pytest.fixture
def members(tmp_path: Path) -> dict[str, IndexRecord]:
    """Two datasets: samples 0 to 39, and 40 to 47; only the first has a val split."""
    found = {}
    for name, keys, val_share in (("clips", range(40), 0.2), ("images", range(40, 48), 0.0)):
        encoded = add_parts(tmp_path / name / "encode", [keys])
        sharded = shards.run(ShardConfig(val_share=val_share), encoded, tmp_path / name / "shard")
        found[name] = index.run(IndexConfig(workers=1), sharded, tmp_path / name / "index")
    return found


def loader(folder: Path, split: str = "train") -> Any:
    data = get_train_dataset(
        folder / blend.METADATASET_NAME, split_part=split, batch_size=1, task_encoder=Encoder(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), shuffle_buffer_size=8,
        max_samples_per_sequence=None,
    )  # fmt: skip
    return get_savable_loader(data)


def test_energon_mixes_the_datasets_in_their_shares(members: dict[str, IndexRecord], tmp_path: Path) -> None:
    weights = {members["clips"].path: 3.0, members["images"].path: 1.0}
    record = blend.run(weights, tmp_path / "blend")
    assert record.encoder == members["clips"].encoder and blend.members_of(record.path) == list(weights)
    assert record.num_samples == {
        "train": members["clips"].num_samples["train"] + 8, "val": members["clips"].num_samples["val"]
    }  # fmt: skip
    drawn = [int(sample.__key__.split("/")[-1][3:]) for sample in islice(loader(record.path), 800)]
    counts = Counter(key >= 40 for key in drawn)
    assert abs(counts[True] - 200) < 50  # 4 standard deviations of 800 draws at 1/4
    assert {key for key in drawn if key >= 40} == set(range(40, 48))
    assert all(int(sample.__key__.split("/")[-1][3:]) < 40 for sample in islice(loader(record.path, "val"), 30))


def test_a_stream_of_a_blend_goes_on_where_it_was_saved(members: dict[str, IndexRecord], tmp_path: Path) -> None:
    record = blend.run({members["clips"].path: 0.5, members["images"].path: 0.5}, tmp_path / "blend")
    whole = loader(record.path)
    stream = iter(whole)
    list(islice(stream, 13))
    state = whole.save_state_rank()
    after = [sample.__key__ for sample in islice(stream, 40)]
    resumed = loader(record.path)
    resumed.restore_state_rank(state)
    assert [sample.__key__ for sample in islice(iter(resumed), 40)] == after


def test_a_blend_moves_with_its_members_and_refuses_others(members: dict[str, IndexRecord], tmp_path: Path) -> None:
    weights = {record.path: 1.0 for record in members.values()}
    record = blend.run(weights, tmp_path / "blend")
    assert blend.run({path: 5.0 for path in weights}, tmp_path / "blend") == record  # only proportions count
    other = blend.run({path: 1.0 + i for i, path in enumerate(weights)}, tmp_path / "other")
    assert other.fingerprint != record.fingerprint
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved")) / "blend"
    assert blend.members_of(moved)[0].is_relative_to(moved.parent)
    sharded = shards.run(
        ShardConfig(val_share=0.0), add_parts(tmp_path / "clips" / "encode", [range(60, 62)]), tmp_path / "shard"
    )
    index.run(IndexConfig(workers=1), sharded, members["clips"].path)
    with pytest.raises(ValueError, match="is another dataset than when it was blended; run `wan blend` again"):
        blend.members_of(record.path)
    shutil.rmtree(moved.parent / "images")
    with pytest.raises(ValueError, match=r"images/index, part of the blend .* is gone"):
        blend.members_of(moved)


def test_blends_that_cannot_be(members: dict[str, IndexRecord], tmp_path: Path) -> None:
    clips, images = members["clips"].path, members["images"].path
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not positive; give its share"):
            blend.run({clips: 1.0, images: weight}, tmp_path / "blend")
    with pytest.raises(ValueError, match="is no indexed dataset"):
        blend.run({tmp_path / "nowhere": 1.0}, tmp_path / "blend")
    with pytest.raises(ValueError, match="is an output of shard"):
        blend.run({tmp_path / "clips" / "shard": 1.0}, tmp_path / "blend")
    nested = blend.run({clips: 1.0, images: 1.0}, tmp_path / "nested").path
    with pytest.raises(ValueError, match="is itself a blend"):
        blend.run({nested: 1.0, clips: 1.0}, tmp_path / "blend")
    shutil.copytree(clips, tmp_path / "copy")
    with pytest.raises(ValueError, match="named twice"):
        blend.run({clips: 1.0, tmp_path / "copy": 1.0}, tmp_path / "blend")
    encoded = replace(add_parts(tmp_path / "else", [range(9)]), encoder={"vae": "v", "text": "another"})
    sharded = shards.run(ShardConfig(val_share=0.0), encoded, tmp_path / "else-shard")
    other = index.run(IndexConfig(workers=1), sharded, tmp_path / "else-index").path
    with pytest.raises(ValueError, match="differ in text; encode both with the same model"):
        blend.run({clips: 1.0, other: 1.0}, tmp_path / "blend")
    assert not (tmp_path / "blend").exists()
