"""How fast shard rewrites parts, beside the disk's own rate; how much a million samples cost to plan.

    python benchmarks/shards.py FOLDER [--gib 4] [--samples 1000000]

Writes below FOLDER (on the disk to be measured) and removes it all again. Every file is dropped from the page cache
before it is read, so reading is the disk's, too. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from wan_core import records
from wan_core.config import STORED_TEXTS, EncodeConfig, ShardConfig
from wan_core.data import shards
from wan_core.data.parts import StoredSamples
from wan_core.data.samples import ClipInfo, Sample, saved, write_sample
from wan_core.records import EncodeRecord

CLIPS_PER_PART = 64
PIECE = 8 << 20
INFO = ClipInfo(
    caption="a clip", digest="0" * 64, start_frame=0, end_frame=None, frames=81, fps=16.0, height=480, width=832,
    mode="video", center_crop=True, tiled=False, vae_dtype="float32", text_dtype="bfloat16", encoder={"vae": "none"},
)  # fmt: skip


def make_parts(folder: Path, num_clips: int) -> EncodeRecord:
    """Parts of 81 x 480 x 832 clips: 8.4 MB of latents and 1.6 MB of text each."""
    lines: list[str] = []
    for number, first in enumerate(range(0, num_clips, CLIPS_PER_PART)):
        part = folder / "parts" / f"{number:012d}"
        part.mkdir(parents=True)
        latents, text = torch.randn(16, 21, 60, 104), torch.randn(200, 4096).bfloat16()
        with tarfile.open(part / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for clip in range(first, min(first + CLIPS_PER_PART, num_clips)):
                key = records.digest(clip)[:20]
                write_sample(tar, Sample(key, latents, text, INFO))
                lines.append(json.dumps({"key": key, "path": "x", "digest": records.digest(clip), "part": part.name}))
        with tarfile.open(part / "part.tar") as tar:
            (part / "members.json").write_text(json.dumps({m.name: [m.offset_data, m.size] for m in tar}))
    return finish(folder, lines)


def make_lists(folder: Path, num_clips: int) -> EncodeRecord:
    """What planning reads of a dataset of so many clips; the parts hold no bytes."""
    lines: list[str] = []
    for number, first in enumerate(range(0, num_clips, CLIPS_PER_PART)):
        part, offset, members = folder / "parts" / f"{number:012d}", 0, {}
        part.mkdir(parents=True)
        (part / "part.tar").touch()
        for clip in range(first, min(first + CLIPS_PER_PART, num_clips)):
            digest = records.digest(clip)
            for kind, size in (("json", 900), ("pickle", 1_638_400), ("pth", 8_388_000)):
                members[f"{digest[:20]}.{kind}"] = [offset + 512, size]
                offset += 512 + -(-size // 512) * 512
            row = {"key": digest[:20], "path": f"{clip}.mp4", "digest": digest, "caption": "c" * 200, "part": part.name}
            lines.append(json.dumps(row))
        (part / "members.json").write_text(json.dumps(members))
    return finish(folder, lines)


def finish(folder: Path, lines: list[str]) -> EncodeRecord:
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    for name in STORED_TEXTS:
        (folder / name).write_bytes(saved(torch.ones(1, 4096)))
    (folder / "quarantine.jsonl").touch()
    record = EncodeRecord(
        stage="encode", path=folder, fingerprint="0" * 64, config=records.identity(EncodeConfig()),
        parts=tuple(sorted((folder / "parts").iterdir())), num_clips=len(lines), num_quarantined=0, encoder={},
    )  # fmt: skip
    records.save_record(record, folder)
    return record


def drop(*paths: Path) -> None:
    """Out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_in_order(source: Path, target: Path) -> None:
    """What `cp` does, and fsync: the rate that rewriting cannot beat."""
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        while piece := old.read(PIECE):
            new.write(piece)
        os.fsync(new.fileno())


def copy_unseen(samples: StoredSamples, shard: shards.Shard, path: Path) -> None:
    """A shard by copy_file_range alone: no byte passes through this process, and none is looked at."""
    with path.open("wb", buffering=0) as new:
        for row in shard.rows:
            with (samples.parts[samples.part[row]] / "part.tar").open("rb", buffering=0) as old:
                offset, left = int(samples.offset[row]), int(samples.num_bytes[row])
                while left:
                    done = os.copy_file_range(old.fileno(), new.fileno(), left, offset)
                    offset, left = offset + done, left - done
        os.fsync(new.fileno())


def measure(name: str, num_bytes: int, before: list[Path], work: Callable[[], object]) -> None:
    drop(*before)
    started, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({
        "what": name, "gigabytes": round(num_bytes / 1e9, 2), "seconds": round(seconds, 2),
        "megabytes_per_second": round(num_bytes / seconds / 1e6), "cpu_seconds": round(cpu, 2),
    }), flush=True)  # fmt: skip


def rewriting(folder: Path, gib: float) -> None:
    encoded = make_parts(folder / "encode", max(1, round(gib * 2**30 / 10.03e6)))
    tars = [part / "part.tar" for part in encoded.parts]
    total = sum(tar.stat().st_size for tar in tars)
    config, out = ShardConfig(val_share=0.0), folder / "out"

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out

    def several(work: Callable[[int], object], count: int) -> None:
        with ThreadPoolExecutor(config.workers) as pool:
            list(pool.map(work, range(count)))

    def in_order() -> None:
        fresh()
        several(lambda number: copy_in_order(tars[number], out / f"{number}"), len(tars))

    samples = StoredSamples.of(encoded)
    planned = shards.plan(config, samples)

    def unseen() -> None:
        fresh()
        several(lambda number: copy_unseen(samples, planned[number], out / f"{number}"), len(planned))

    for _ in range(2):  # a shared disk varies: each twice, in turns
        measure("disk: copy the parts in order", total, tars, in_order)
        measure("copy_file_range in shuffled order, unseen", total, tars, unseen)
        measure("shard", total, tars, lambda: shards.run(config, encoded, fresh() / "shard"))
    measure("shard, parts in the page cache", total, [], lambda: shards.run(config, encoded, fresh() / "shard"))
    profile = cProfile.Profile()
    shard = planned[0]
    profile.runcall(shards.write_shard, fresh() / shard.name, samples, shard)
    rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    spent = {f"{Path(place[0]).name}:{place[2]}": round(values[2], 3) for place, values in rows if values[2] > 0.01}
    print(json.dumps({"what": f"one shard of {len(shard.rows)} samples, one thread, seconds in each function",
                      "seconds": dict(sorted(spent.items(), key=lambda item: -item[1]))}), flush=True)  # fmt: skip


def memory(name: str) -> int:
    """Resident MiB of this process now (VmRSS) or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1024


def planning(folder: Path) -> None:
    """In a process of its own, whose peak memory is planning's."""
    started, base, cpu = time.perf_counter(), memory("VmRSS"), time.process_time()
    encoded = records.load_record(EncodeRecord, folder)
    samples = StoredSamples.of(encoded)
    read = time.perf_counter()
    planned = shards.plan(ShardConfig(), samples)
    cut = time.perf_counter()
    dict(shards._sources(samples, planned))
    print(json.dumps({
        "what": "plan", "samples": len(samples), "parts": len(samples.parts), "shards": len(planned),
        "read_lists_seconds": round(read - started, 2), "shuffle_and_cut_seconds": round(cut - read, 2),
        "identify_seconds": round(time.perf_counter() - cut, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2), "peak_mib_above_imports": memory("VmHWM") - base,
    }), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--plan-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan_only:
        planning(args.plan_only)
        return
    folder = args.folder / "shards-benchmark"
    try:
        make_lists(folder / "lists", args.samples)
        command = [sys.executable, __file__, str(folder), "--plan-only", str(folder / "lists")]
        subprocess.run(command, check=True)
        rewriting(folder, args.gib)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
