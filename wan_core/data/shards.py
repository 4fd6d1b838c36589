"""shard: the samples of an encoded dataset, shuffled and split, as size-limited WebDataset tars.

Which split a clip goes to follows from its bytes alone, so adding data never moves a clip from one to another, and
clips cut from one file stay together. The exception: a split that was asked for and would stay empty (a tiny dataset)
gets the file that lies nearest to it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wan_core import records
from wan_core.config import ShardConfig
from wan_core.data.samples import write_member
from wan_core.records import EncodeRecord, ShardRecord

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Stored:
    """A sample where encode left it."""

    key: str
    digest: str
    part: Path  # part.tar
    members: tuple[tuple[str, int, int], ...]  # name, offset, bytes

    @property
    def num_bytes(self) -> int:
        """In a tar: each member has a header block, and its bytes are padded to blocks."""
        return sum(tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE)) for _, _, size in self.members)


def stage_fingerprint(config: ShardConfig, encoded: EncodeRecord) -> str:
    return records.fingerprint("shard", config, encode=encoded.fingerprint)


def run(config: ShardConfig, encoded: EncodeRecord, output_dir: Path) -> ShardRecord:
    """Write `<split>-<number>.tar`, `empty_text.pt` and `encoder.json`; members are copied byte for byte.

    Raises:
        ValueError: the clips do not suffice for train and every split that was asked for.
    """
    wanted = stage_fingerprint(config, encoded)
    if found := records.find_record(ShardRecord, output_dir, wanted):
        return found
    samples = _stored_samples(encoded)
    splits = assign_splits({sample.digest for sample in samples}, config.val_share, config.test_share)
    samples.sort(key=lambda sample: _hash(f"{config.seed} {sample.key}"))
    shards: dict[str, int] = {}
    with records.writing("shard", output_dir, config, wanted) as output:
        for split in SPLITS:
            chosen = [sample for sample in samples if splits[sample.digest] == split]
            for number, group in enumerate(_groups(config, chosen)):
                name = f"{split}-{number:05d}.tar"
                _write_shard(output.path / name, group)
                shards[name] = len(group)
        shutil.copyfile(encoded.path / "empty_text.pt", output.path / "empty_text.pt")
        (output.path / "encoder.json").write_text(json.dumps(encoded.encoder, indent=1, sort_keys=True))
        counts = {split: sum(n for name, n in shards.items() if name.startswith(f"{split}-")) for split in SPLITS}
        return output.finish(
            ShardRecord, num_samples={split: n for split, n in counts.items() if n}, shards=shards,
            encoder=encoded.encoder,
        )  # fmt: skip


def assign_splits(digests: set[str], val_share: float, test_share: float) -> dict[str, str]:
    """Digest of a file -> its split: val takes the lowest hashes, test the highest, so that neither moves the other.

    Raises:
        ValueError: fewer files than splits.
    """
    ordered = sorted(digests, key=_hash)
    num_splits = 1 + (val_share > 0) + (test_share > 0)
    if len(ordered) < num_splits:
        raise ValueError(
            f"{len(ordered)} different files cannot fill {num_splits} splits (train, val_share={val_share}, "
            f"test_share={test_share}); add clips, or set val_share and test_share to 0"
        )
    splits = {}
    for value in ordered:
        position = _hash(value)
        splits[value] = "val" if position < val_share else "test" if position >= 1 - test_share else "train"
    if val_share > 0:
        splits[ordered[0]] = "val"
    if test_share > 0:
        splits[ordered[-1]] = "test"
    if "train" not in splits.values():
        raise ValueError(
            f"none of {len(ordered)} different files falls to train (val_share={val_share}, test_share={test_share}); "
            "add clips, or lower the shares"
        )
    return splits


def _hash(text: str) -> float:
    """Evenly spread over [0, 1), the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)


def _stored_samples(encoded: EncodeRecord) -> list[_Stored]:
    folders = {folder.name: folder for folder in encoded.parts}
    members: dict[str, dict[str, list[tuple[str, int, int]]]] = {}  # part -> key -> members
    for name, folder in folders.items():
        by_key = members.setdefault(name, {})
        for member, (offset, size) in json.loads((folder / "members.json").read_text()).items():
            by_key.setdefault(member.partition(".")[0], []).append((member, offset, size))
    rows = map(json.loads, (encoded.path / "clips.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        _Stored(row["key"], row["digest"], folders[row["part"]] / "part.tar", tuple(members[row["part"]][row["key"]]))
        for row in rows
    ]


def _groups(config: ShardConfig, samples: list[_Stored]) -> Iterator[list[_Stored]]:
    """Runs of samples within max_samples and max_bytes; a sample that alone exceeds max_bytes has a shard to itself."""
    group: list[_Stored] = []
    num_bytes = 0
    for sample in samples:
        if group and (len(group) == config.max_samples or num_bytes + sample.num_bytes > config.max_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(sample)
        num_bytes += sample.num_bytes
    if group:
        yield group


def _write_shard(path: Path, samples: list[_Stored]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            with sample.part.open("rb") as part:  # not kept open: a shard may touch more parts than files may be open
                for name, offset, size in sample.members:
                    part.seek(offset)
                    write_member(tar, name, part.read(size))
