import contextlib
import json
import os
import resource
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from tests.data.test_samples import INFO
from wan_core import records
from wan_core.config import STORED_TEXTS, EncodeConfig, ShardConfig
from wan_core.data import shards
from wan_core.data.samples import Sample, saved, write_sample
from wan_core.output import StageOutput
from wan_core.records import EncodeRecord, ShardRecord


def make_encoded(folder: Path, num_samples: int, num_parts: int = 3, per_file: int = 1) -> EncodeRecord:
    """An encoded dataset as encode.stage leaves it; sample i is the same whatever the number of parts."""
    return add_parts(folder, [range(p, num_samples, num_parts) for p in range(num_parts)], per_file)


def add_parts(folder: Path, groups: list[range], per_file: int = 1) -> EncodeRecord:
    """Encode more samples into a folder; those that it has stay."""
    clips = folder / "clips.jsonl"
    lines = clips.read_text().splitlines() if clips.exists() else []
    for group in groups:
        part = folder / "parts" / f"part{group.start}-{group.step}"
        part.mkdir(parents=True)
        with tarfile.open(part / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in group:
                write_sample(tar, sample(i))
                line = {"key": sample(i).key, "digest": records.digest(i // per_file), "part": part.name}
                lines.append(json.dumps({**line, "path": f"{i}.mp4", "caption": "x"}))
        with tarfile.open(part / "part.tar") as tar:
            (part / "members.json").write_text(json.dumps({m.name: [m.offset_data, m.size] for m in tar}))
    clips.write_text("\n".join(lines) + "\n")
    for name in STORED_TEXTS:
        (folder / name).write_bytes(saved(torch.ones(1, 8)))
    (folder / "quarantine.jsonl").write_text('{"path": "bad.mp4", "reason": "too short: 3 frames"}\n')
    num_samples, parts = len(lines), tuple(sorted((folder / "parts").iterdir()))
    return StageOutput("encode", folder, folder, EncodeConfig(), records.digest(num_samples)).finish(
        EncodeRecord, parts=parts, num_clips=num_samples, num_quarantined=1, encoder={"vae": "v", "text": "t"}
    )


def sample(i: int) -> Sample:
    latents = i + torch.linspace(0, 0.5, 16 * (1 + i % 3) * (2 + 2 * (i % 2)) * 4).view(16, 1 + i % 3, -1, 4)
    return Sample(f"key{i:04d}", latents, torch.full((3, 8), i).bfloat16(), replace(INFO, caption=f"caption {i}"))


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
    for name in STORED_TEXTS:
        assert (record.path / name).read_bytes() == (encoded.path / name).read_bytes()


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


def test_shards_are_cut_like_a_binary_tree() -> None:
    places = np.sort(np.random.default_rng(0).integers(0, 1 << 64, 1000, dtype=np.uint64))
    ends = np.arange(1001) * 10
    found = list(shards.cut(places, ends, max_samples=100, max_bytes=700))
    assert [begin for _, begin, _ in found] == [0, *(end for _, _, end in found[:-1])] and found[-1][2] == 1000
    for bits, begin, end in found:
        assert 0 < end - begin <= 70  # the bytes are the tighter limit
        assert all(f"{int(value):064b}".startswith(bits) for value in places[begin:end])
        above = [value for value in places if f"{int(value):064b}".startswith(bits[:-1])]
        assert len(above) > 70  # a shard of one bit less would have been too large
    assert list(shards.cut(places, ends, 1000, 10_000)) == [("", 0, 1000)]
    assert list(shards.cut(places[:0], ends[:1], 1, 1)) == []


def test_adding_clips_writes_only_the_shards_that_they_fall_into(tmp_path: Path) -> None:
    config = ShardConfig(val_share=0.1, max_samples=6)
    first = shards.run(config, make_encoded(tmp_path / "encode", 60), tmp_path / "first")
    more = add_parts(tmp_path / "encode", [range(60, 63)])
    grown = shards.run(config, more, tmp_path / "grown", earlier=first.path)
    whole = shards.run(config, more, tmp_path / "whole")
    assert {n: (grown.path / n).read_bytes() for n in grown.files} == {
        n: (whole.path / n).read_bytes() for n in whole.files
    }  # an earlier output saves work and changes nothing
    linked = {n for n in grown.shards if (first.path / n).exists() and os.path.samefile(first.path / n, grown.path / n)}
    falls = {n for n in grown.shards if set(keys(grown.path, n)) & {"key0060", "key0061", "key0062"}}
    cut_in_two = {n for n in grown.shards if n not in first.shards}
    assert linked == grown.shards.keys() - falls - cut_in_two and len(linked) > len(grown.shards) / 2
    in_place = shards.run(config, more, first.path)  # as `python -m wan_core.encode` does it
    assert in_place.shards == grown.shards and all(os.path.samefile(first.path / n, grown.path / n) for n in linked)


def test_a_part_that_was_encoded_again_is_copied_again(tmp_path: Path) -> None:
    config = ShardConfig(val_share=0)
    encoded = make_encoded(tmp_path / "encode", 9, num_parts=1)
    first = shards.run(config, encoded, tmp_path / "first")
    part = encoded.parts[0] / "part.tar"
    os.utime(part, ns=(0, 0))
    second = shards.run(config, encoded, tmp_path / "second", earlier=first.path)
    assert not os.path.samefile(first.path / "train-all.tar", second.path / "train-all.tar")


def test_the_catalogue_has_a_row_per_sample(tmp_path: Path) -> None:
    config = ShardConfig(val_share=0.3, max_samples=5)
    record = shards.run(config, make_encoded(tmp_path / "encode", 20), tmp_path / "shard")
    rows = pyarrow.parquet.read_table(record.path / "samples.parquet").to_pylist()
    assert [row["key"] for row in rows] == [key for name in record.shards for key in keys(record.path, name)]
    for row in rows:
        i = int(row["key"][3:])
        assert row["shard"] in record.shards and row["shard"].startswith(row["split"])
        assert row["caption"] == f"caption {i}" and row["text_length"] == 3
        assert row["num_tokens"] == (1 + i % 3) * (1 + i % 2) * 2  # patches of 1x2x2
        assert (row["frames"], row["fps"], row["height"], row["width"]) == (9, 16.0, 32, 48)


@pytest.mark.parametrize("num_files", [1, 2, 3, 10, 100, 2000])
def test_a_file_never_changes_its_split_when_data_is_added(num_files: int) -> None:
    config = ShardConfig(val_share=0.1, test_share=0.05)
    places = np.array([shards.place(records.digest(i)) for i in range(2000)], dtype=np.uint64)
    every = shards.split_of(places, config)
    assert np.array_equal(shards.split_of(places[:num_files], config), every[:num_files])
    counts = np.bincount(every)
    assert abs(counts[1] - 200) < 50 and abs(counts[2] - 100) < 40  # 3.5 standard deviations
    more_val = shards.split_of(places, replace(config, val_share=0.3))
    assert np.array_equal(more_val[every > 0], every[every > 0])


def test_splits_that_stay_empty_are_not_there_and_an_empty_train_is_an_error(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 3)
    record = shards.run(ShardConfig(val_share=0.001, test_share=0.001), encoded, tmp_path / "shard")
    assert record.num_samples == {"train": 3} and list(record.shards) == ["train-all.tar"]
    with pytest.raises(ValueError, match="none of 3 different files falls to train"):
        shards.run(ShardConfig(val_share=0.999), encoded, tmp_path / "other")


def test_clips_of_one_file_share_a_split(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 60, per_file=3)
    record = shards.run(ShardConfig(val_share=0.3), encoded, tmp_path / "shard")
    val = {int(key[3:]) for key in keys(record.path, "val-*")}
    assert val and all({i // 3 * 3, i // 3 * 3 + 1, i // 3 * 3 + 2} <= val for i in val)


def test_second_run_returns_the_record_and_a_damaged_one_is_rewritten(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 12)
    config = ShardConfig(val_share=0.2)
    record = shards.run(config, encoded, tmp_path / "shard")
    assert record.fingerprint == shards.stage_fingerprint(config, encoded)
    assert shards.run(config, encoded, tmp_path / "shard") == record
    assert records.load_record(ShardRecord, tmp_path / "shard") == record
    shard = tmp_path / "shard" / "train-all.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    shards.run(config, encoded, tmp_path / "shard")
    assert shard.read_bytes() == raw


def damaged(what: str, encoded: EncodeRecord) -> None:
    part, tar = encoded.parts[0], encoded.parts[0] / "part.tar"
    members = json.loads((part / "members.json").read_text())
    raw = bytearray(tar.read_bytes())
    if what == "cut in half":
        del raw[len(raw) // 2 :]
    elif what.startswith("a bit of"):
        tensor = sample(3).latents if what == "a bit of the latents" else sample(3).text_embeds
        raw[raw.index(tensor.view(torch.uint8).numpy().tobytes()) + 9] ^= 1
    elif what == "a header":
        raw[members["key0000.pth"][0] - 400] ^= 1
    elif what == "NaN":
        offset, size = members["key0000.pth"]
        bad = sample(0).latents
        bad[3, 0, 1, 1] = float("nan")
        assert len(saved(bad)) == size
        raw[offset : offset + size] = saved(bad)
    elif what == "another part's members":
        (part / "members.json").write_bytes((encoded.parts[1] / "members.json").read_bytes())
    tar.write_bytes(raw)


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("cut in half", "ends too early"), ("a bit of the latents", "checksum of archive/data/0 differs"),
        ("a bit of the text", "checksum of archive/data/0 differs"), ("a header", "header of .pth"),
        ("NaN", ".pth's values are not finite"), ("another part's members", "members.json lacks members of sample key"),
    ],
)  # fmt: skip
def test_damaged_parts_are_refused_and_leave_nothing(tmp_path: Path, what: str, sentence: str) -> None:
    encoded = make_encoded(tmp_path / "encode", 12)
    damaged(what, encoded)
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match=f"{encoded.parts[0]}.*{sentence}.* encode again"):
        shards.run(ShardConfig(val_share=0), encoded, tmp_path / "work" / "shard")
    assert list((tmp_path / "work").iterdir()) == []


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow further, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 30)
    (tmp_path / "work").mkdir()
    with largest_file(50_000), pytest.raises(OSError, match=r"File too large.*train-all\.tar"):
        shards.run(ShardConfig(val_share=0), encoded, tmp_path / "work" / "shard")
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(ValueError, match=r"the shards take 1048576.00 GiB, but the disk of .* has .* GiB free"):
        shards.check_room(1 << 50, tmp_path)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """/sys refuses new folders even to root, as a read-only disk does."""
    encoded = make_encoded(tmp_path / "encode", 3)
    with pytest.raises(OSError, match="/sys/shard"):
        shards.run(ShardConfig(val_share=0), encoded, Path("/sys/shard/wan-1"))


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 40)
    config, found = ShardConfig(val_share=0, max_samples=4), []
    threads = [
        threading.Thread(target=lambda: found.append(shards.run(config, encoded, tmp_path / "work" / "shard")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {record.fingerprint for record in found} == {shards.stage_fingerprint(config, encoded)}
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["shard"]
    assert records.find_record(ShardRecord, tmp_path / "work" / "shard", found[0].fingerprint)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    encoded = make_encoded(tmp_path / "encode", 3)
    pid = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(pid, 0)
    left = tmp_path / f".shard.{os.uname().nodename}.{pid}-1"
    other = tmp_path / f".shard.another-host.{pid}-1"
    for folder in (left, other):
        (folder / "half").mkdir(parents=True)
    shards.run(ShardConfig(val_share=0), encoded, tmp_path / "shard")
    assert not left.exists() and other.exists()
