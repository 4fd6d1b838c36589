import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.test_samples import INFO
from wan_core import records
from wan_core.config import EncodeConfig, ShardConfig
from wan_core.data import shards
from wan_core.data.samples import Sample, saved, write_sample
from wan_core.records import EncodeRecord, ShardRecord


def make_encoded(folder: Path, num_samples: int, num_parts: int = 3, per_file: int = 1) -> EncodeRecord:
    """An encoded dataset as encode.stage leaves it; sample i is the same whatever the number of parts."""
    lines, parts = [], []
    for p in range(num_parts):
        part = folder / "parts" / f"part{p}"
        part.mkdir(parents=True)
        parts.append(part)
        with tarfile.open(part / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(p, num_samples, num_parts):
                key, digest = f"key{i:04d}", records.digest(i // per_file)
                write_sample(tar, Sample(key, torch.full((16, 1 + i % 3, 2, 2), i), torch.full((3, 8), i), INFO))
                lines.append({"key": key, "path": f"{i}.mp4", "digest": digest, "caption": "x", "part": part.name})
        with tarfile.open(part / "part.tar") as tar:
            (part / "members.json").write_text(json.dumps({m.name: [m.offset_data, m.size] for m in tar}))
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "empty_text.pt").write_bytes(saved(torch.ones(1, 8)))
    return records.StageOutput("encode", folder, folder, EncodeConfig(), records.digest(num_samples)).finish(
        EncodeRecord, parts=tuple(parts), num_clips=num_samples, num_quarantined=0, encoder={"vae": "v", "text": "t"}
    )


def keys(folder: Path, pattern: str) -> list[str]:
    names = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            names += [name[:-4] for name in tar.getnames() if name.endswith(".pth")]
    return names


def test_every_sample_lands_once_with_its_bytes(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 40)
    record = shards.run(ShardConfig(val_share=0.2, test_share=0.1, max_samples=7), encoded, tmp_path / "shard")
    written: dict[str, bytes] = {}
    for name, count in record.shards.items():
        with tarfile.open(record.path / name) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        assert len(contents) == 3 * count <= 21 and not contents.keys() & written.keys()
        written |= contents
    original: dict[str, bytes] = {}
    for part in encoded.parts:
        with tarfile.open(part / "part.tar") as tar:
            original |= {member.name: tar.extractfile(member).read() for member in tar}
    assert written == original
    assert sum(record.num_samples.values()) == 40 and set(record.num_samples) == {"train", "val", "test"}
    assert json.loads((record.path / "encoder.json").read_text()) == encoded.encoder
    assert (record.path / "empty_text.pt").read_bytes() == (encoded.path / "empty_text.pt").read_bytes()


def test_order_is_shuffled_by_seed_and_independent_of_parts(tmp_path: Path) -> None:
    config = ShardConfig(val_share=0, max_samples=10)
    one, three = (make_encoded(tmp_path / f"e{n}", 40, num_parts=n) for n in (1, 3))
    first, second = shards.run(config, one, tmp_path / "s1"), shards.run(config, three, tmp_path / "s3")
    assert all((first.path / n).read_bytes() == (second.path / n).read_bytes() for n in first.shards)
    order = keys(first.path, "train-*")
    assert sorted(order) == [f"key{i:04d}" for i in range(40)] != order
    other = shards.run(replace(config, seed=1), one, tmp_path / "s1b")
    assert keys(other.path, "train-*") != order and sorted(keys(other.path, "train-*")) == sorted(order)


def test_shards_stay_below_max_bytes(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 30)
    record = shards.run(ShardConfig(val_share=0, max_bytes=40_000), encoded, tmp_path / "shard")
    end_of_tar = tarfile.RECORDSIZE  # zeros that fill up the last record
    sizes = [(record.path / name).stat().st_size for name in record.shards]
    assert len(sizes) > 3 and max(sizes) <= 40_000 + end_of_tar
    alone = shards.run(ShardConfig(val_share=0, max_bytes=1), encoded, tmp_path / "alone")
    assert set(alone.shards.values()) == {1} and len(alone.shards) == 30


def test_splits_are_stable_when_data_is_added() -> None:
    digests = [records.digest(i) for i in range(2000)]
    few = shards.assign_splits(set(digests[:1000]), 0.1, 0.05)
    many = shards.assign_splits(set(digests), 0.1, 0.05)
    assert all(many[value] == split for value, split in few.items())
    counts = {split: list(many.values()).count(split) for split in shards.SPLITS}
    assert abs(counts["val"] - 200) < 50 and abs(counts["test"] - 100) < 40  # 3.5 standard deviations
    more_val = shards.assign_splits(set(digests), 0.3, 0.05)
    assert all(more_val[value] == split for value, split in many.items() if split != "train")


def test_clips_of_one_file_share_a_split(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 60, per_file=3)
    record = shards.run(ShardConfig(val_share=0.3), encoded, tmp_path / "shard")
    val = {int(key[3:]) for key in keys(record.path, "val-*")}
    assert val and all({i // 3 * 3, i // 3 * 3 + 1, i // 3 * 3 + 2} <= val for i in val)


@pytest.mark.parametrize("seed", range(5))
def test_tiny_datasets_fill_every_split_asked_for(seed: int) -> None:
    digests = {records.digest(random.Random(seed).random() + i) for i in range(3)}
    splits = shards.assign_splits(digests, 0.01, 0.01)
    assert sorted(splits.values()) == ["test", "train", "val"]
    assert set(shards.assign_splits(digests, 0, 0).values()) == {"train"}
    with pytest.raises(ValueError, match="2 different files cannot fill 3 splits"):
        shards.assign_splits(set(sorted(digests)[:2]), 0.01, 0.01)
    with pytest.raises(ValueError, match="falls to train"):
        shards.assign_splits(digests, 0.999, 0)


def test_second_run_returns_the_record_and_a_damaged_one_is_rewritten(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 12)
    config = ShardConfig(val_share=0.2)
    record = shards.run(config, encoded, tmp_path / "shard")
    assert record.fingerprint == shards.stage_fingerprint(config, encoded)
    assert shards.run(config, encoded, tmp_path / "shard") == record
    assert records.load_record(ShardRecord, tmp_path / "shard") == record
    shard = tmp_path / "shard" / "train-00000.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    shards.run(config, encoded, tmp_path / "shard")
    assert shard.read_bytes() == raw
