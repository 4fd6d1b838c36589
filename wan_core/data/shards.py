"""shard: the samples of an encoded dataset, shuffled and split, as size-limited WebDataset tars.

    <output_dir>/<split>-<bits>.tar   samples whose place in the shuffle begins with these bits
                 samples.parquet      a row per sample: caption, size, tokens, its split and shard
                 quarantine.jsonl     what encode left out, and why
                 empty_text.pt        embedding of the empty caption, and
                 negative_text.pt     of the negative prompt
                 encoder.json         what the latents and embeddings were made with
                 record.json          ShardRecord, written last

The split of a clip follows from its file's bytes alone, its place in the shuffle from the seed and its key: neither
depends on what else is in the dataset. A shard that would be too large is cut in two, one bit longer. So adding clips
changes the shards that they fall into and no other; those are linked from an earlier output, not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wan_core import records
from wan_core.config import STORED_TEXTS, ShardConfig, check
from wan_core.data.catalogue import Catalogue, Row
from wan_core.data.parts import StoredSamples
from wan_core.output import link, writing
from wan_core.records import EncodeRecord, ShardRecord

SPLITS = ("train", "val", "test")
END_OF_TAR = 2 * tarfile.BLOCKSIZE  # two blocks of zeros, then more up to a whole record
ENCODER_NAME = "encoder.json"
SOURCES_NAME = ".sources.json"  # shard -> what it was cut from; hidden, so no part of the record


@dataclass(frozen=True)
class Shard:
    """A shard to be."""

    name: str
    rows: np.ndarray  # of StoredSamples, in the order of the shuffle
    num_bytes: int  # of the tar

    @property
    def split(self) -> str:
        return self.name.partition("-")[0]


def stage_fingerprint(config: ShardConfig, encoded: EncodeRecord) -> str:
    return records.fingerprint("shard", config, encode=encoded.fingerprint)


def run(config: ShardConfig, encoded: EncodeRecord, output_dir: Path, earlier: Path | None = None) -> ShardRecord:
    """Write the shards; samples are copied byte for byte, equal inputs give equal files.

    Args:
        earlier: an output of this stage; shards that it holds just so are linked. `output_dir` may be one, too.

    Raises:
        ValueError: a part is damaged, no clip falls to train, or the disk has not the room.
    """
    wanted = stage_fingerprint(config, encoded)
    if found := records.find_record(ShardRecord, output_dir, wanted):
        return found
    samples = StoredSamples.of(encoded)
    shards = plan(config, samples)
    sources = dict(_sources(samples, shards))
    earlier = earlier or output_dir
    kept = unchanged(sources, earlier)
    new = [shard for shard in shards if shard.name not in kept]
    with writing("shard", output_dir, config, wanted) as output:
        check_room(sum(shard.num_bytes for shard in new), output.path)
        for name in kept:
            link(earlier / name, output.path / name)
        written = write_shards(samples, new, output.path, config.workers)
        with Catalogue.writing(output.path, earlier if kept else None) as catalogue:
            for shard in shards:
                if shard.name in kept:
                    catalogue.copy(kept[shard.name])
                else:
                    catalogue.add(shard.split, shard.name, next(written))
        (output.path / SOURCES_NAME).write_text(json.dumps(sources))
        for name in (*STORED_TEXTS, "quarantine.jsonl"):
            shutil.copyfile(encoded.path / name, output.path / name)
        (output.path / ENCODER_NAME).write_text(json.dumps(encoded.encoder, indent=1, sort_keys=True))
        counts = {split: sum(len(shard.rows) for shard in shards if shard.split == split) for split in SPLITS}
        return output.finish(
            ShardRecord, num_samples={split: n for split, n in counts.items() if n},
            shards={shard.name: len(shard.rows) for shard in shards}, encoder=encoded.encoder,
        )  # fmt: skip


def plan(config: ShardConfig, samples: StoredSamples) -> list[Shard]:
    """Which sample goes where, from hashes alone.

    Raises:
        ValueError: none falls to train.
    """
    splits = split_of(np.array([place(digest) for digest in samples.digests], dtype=np.uint64), config)
    places = np.array([place(f"{config.seed} {key}") for key in samples.keys], dtype=np.uint64)
    check(
        bool((splits == 0).any()),
        f"none of {len(set(samples.digests))} different files falls to train (val_share={config.val_share}, "
        f"test_share={config.test_share}); add clips, or lower the shares",
    )
    shards = []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(splits == number)
        rows = rows[np.argsort(places[rows], kind="stable")]
        ends = np.concatenate([[0], np.cumsum(samples.num_bytes[rows])])
        for bits, begin, end in cut(places[rows], ends, config.max_samples, config.max_bytes):
            size = -(-int(ends[end] - ends[begin] + END_OF_TAR) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
            shards.append(Shard(f"{split}-{bits or 'all'}.tar", rows[begin:end], size))
    return shards


def place(text: str) -> int:
    """Evenly spread over [0, 2^64), the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(places: np.ndarray, config: ShardConfig) -> np.ndarray:
    """Index into SPLITS of files at these places: val takes the lowest, test the highest, so neither moves the other.

    A share that meets no file gives an empty split. To fill it with the nearest file would move that file to train
    as soon as a nearer one is added, and the model would learn what it is validated on.
    """
    position = places / 2.0**64
    return np.select([position < config.val_share, position >= 1 - config.test_share], [1, 2], 0)


def cut(
    places: np.ndarray, ends: np.ndarray, max_samples: int, max_bytes: int, bits: str = ""
) -> Iterator[tuple[str, int, int]]:
    """Halve [0, 2^64) until each part is within the limits or holds one sample; parts without samples are left out.

    Args:
        places: uint64 [n], ascending.
        ends: int64 [n + 1], bytes of the first i samples.

    Returns:
        per part its leading bits, and begin and end in `places`.
    """

    def parts(bits: str, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        if end - begin <= 1 or (end - begin <= max_samples and ends[end] - ends[begin] <= max_bytes):
            if end > begin:
                yield bits, begin, end
            return
        assert len(bits) < 64, f"two samples at place {places[begin]}"
        half = np.uint64(int((bits + "1").ljust(64, "0"), 2))
        middle = begin + int(np.searchsorted(places[begin:end], half))
        yield from parts(bits + "0", begin, middle)
        yield from parts(bits + "1", middle, end)

    return parts(bits, 0, len(places))


def _sources(samples: StoredSamples, shards: Iterable[Shard]) -> Iterator[tuple[str, str]]:
    """Name of each shard, and a digest of its samples' keys and of the very bytes that they are copied from.

    Parts are written once, so a file's identity and time of change stand for its content.
    """
    states = [(folder / "part.tar").stat() for folder in samples.parts]
    files = [f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns}" for state in states]
    for shard in shards:
        lines = [f"{samples.keys[row]} {files[samples.part[row]]} {samples.offset[row]}" for row in shard.rows]
        yield shard.name, records.digest([records.CODE_VERSIONS["shard"], *lines])


def unchanged(sources: dict[str, str], earlier: Path) -> dict[str, int]:
    """The shards that an earlier output holds just so, and the number that each has there."""
    if not (earlier / SOURCES_NAME).is_file() or not (earlier / records.RECORD_NAME).is_file():
        return {}
    sizes = records.load_record(ShardRecord, earlier).files
    known = enumerate(json.loads((earlier / SOURCES_NAME).read_text()).items())
    same = {name: number for number, (name, source) in known if sources.get(name) == source}
    paths = {name: earlier / name for name in same}
    return {n: same[n] for n, path in paths.items() if path.is_file() and path.stat().st_size == sizes[n]}


def check_room(needed: int, folder: Path) -> None:
    """Raise ValueError: the disk would be full before the shards are written."""
    free = shutil.disk_usage(folder).free
    check(
        needed <= free,
        f"the shards take {needed / 2**30:.2f} GiB, but the disk of {folder.parent} has {free / 2**30:.2f} GiB free; "
        "make room, or choose another workspace",
    )


def write_shards(samples: StoredSamples, shards: list[Shard], folder: Path, workers: int) -> Iterator[list[Row]]:
    """Write shards, several at a time; yields the catalogue rows of each, in order."""
    pool = ThreadPoolExecutor(workers)  # checksums, reading and writing leave Python's lock alone
    try:
        yield from pool.map(lambda shard: write_shard(folder / shard.name, samples, shard), shards)
    finally:
        pool.shutdown(cancel_futures=True)


def write_shard(path: Path, samples: StoredSamples, shard: Shard) -> list[Row]:
    """Copy a shard's samples, one after the other.

    Raises:
        ValueError: a part is damaged.
        OSError: the disk is full or failing; names the shard.
    """
    rows = []
    with path.open("xb", buffering=0) as tar:
        for row in shard.rows:
            sample = samples.read(row)
            _write(tar, sample.raw)
            # The disk begins to write now, not at the end; and who writes terabytes has no use for them in memory.
            os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            rows.append(Row.of(samples.keys[row], sample))
        _write(tar, bytes(shard.num_bytes - tar.tell()))
        os.fsync(tar.fileno())  # here, while other shards are being copied, rather than at the end for all
    return rows


def _write(file: io.FileIO, raw: bytes) -> None:
    view = memoryview(raw)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error
