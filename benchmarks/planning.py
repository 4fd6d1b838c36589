"""Seconds and peak memory of planning the encode stage for a manifest of a million rows.

    python benchmarks/planning.py [--rows 1000000] [--case ranges-jsonl ...] [--plan first again]

Each case runs in a process of its own, on a folder made for it (tiny files: planning looks at names, sizes and digests,
never at pictures) and with an empty memory of digests:

    ranges-FORMAT    one meta file with all rows, over 1,000 files
    files-FORMAT     one meta file with one row per file
    sidecars         no meta file; a .txt beside each file

`again` is the same plan a second time, when digests are remembered; `resumed` the one that finds every clip in finished
parts (which are made first, at the pace of the disk's fsync). One JSON line per case and plan.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from wan_core import records
from wan_core.config import STORED_TEXTS, EncodeConfig
from wan_core.encode import stage
from wan_core.encode.part import part_fingerprint
from wan_core.output import StageOutput
from wan_core.records import PartRecord

CAPTION = "A red fox walks through fresh snow at dawn while the camera follows slowly from behind, take {}."
CASES = ("ranges-jsonl", "ranges-json", "ranges-csv", "ranges-parquet", "files-jsonl", "files-parquet", "sidecars")
ENCODER = {"vae": "none"}
CONFIG = EncodeConfig()


def make_folder(folder: Path, case: str, num_rows: int) -> None:
    kind, _, suffix = case.partition("-")
    num_files = min(1000, num_rows) if kind == "ranges" else num_rows
    names = [f"{i % 1000:03d}/{i:07d}.mp4" for i in range(num_files)]
    for i, name in enumerate(names):
        if i < 1000:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"%d" % i)
        if kind == "sidecars":
            (folder / name).with_suffix(".txt").write_text(CAPTION.format(i))
    rows = (
        {
            "file_name": names[i % num_files], "start_frame": i // num_files * 81,
            "end_frame": i // num_files * 81 + 80, "caption": CAPTION.format(i),
        }
        for i in range(num_rows)
    )  # fmt: skip
    if kind != "sidecars":
        WRITERS[suffix](folder / f"meta.{suffix}", rows)


def write_jsonl(path: Path, rows: Any) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path: Path, rows: Any) -> None:
    path.write_text(json.dumps(list(rows)))


def write_csv(path: Path, rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "start_frame", "end_frame", "caption"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet,
}  # fmt: skip


PLANS = ["first", "again", "resumed"]


def make_parts(plan: stage.EncodePlan, output_dir: Path) -> None:
    """What encoding leaves behind, with empty members."""
    for part in plan.parts:
        keys = [clip.key for clip in part.clips]
        folder = output_dir / "parts" / part.name
        folder.mkdir(parents=True)
        members = {f"{key}.{kind}": [0, 0] for key in keys for kind in ("json", "pickle", "pth")}
        (folder / "members.json").write_text(json.dumps(members))
        for name in ("part.tar", "quarantine.jsonl", *STORED_TEXTS):
            (folder / name).touch()
        wanted = part_fingerprint(CONFIG, ENCODER, keys)
        output = StageOutput("encode", folder, folder, CONFIG, wanted)
        records.save_record(output.finish(PartRecord, num_clips=len(keys), num_quarantined=0), folder)


def measure(case: str, which: str, folder: Path, output_dir: Path, then_parts: bool) -> None:
    stage.encoder_identity = lambda model: ENCODER
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    dataset = stage.look(CONFIG, folder, Path())
    looked = time.monotonic()
    plan = stage.plan(CONFIG, dataset, output_dir)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    line = {
        "case": case, "plan": which, "clips": len(dataset.clips), "parts": len(plan.parts),
        "seconds": round(seconds, 1), "of_these_parts": round(time.monotonic() - looked, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_gib": round(after.ru_maxrss / (1 << 20), 2), "imports_gib": round(before.ru_maxrss / (1 << 20), 2),
    }  # fmt: skip
    assert not dataset.quarantined, dataset.quarantined[0]
    print(json.dumps(line), flush=True)
    if then_parts:
        make_parts(plan, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--case", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--plan", nargs="*", choices=PLANS, default=PLANS, help="in this order")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the files (default: a temporary one)")
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    for case in arguments.case:
        scratch = Path(tempfile.mkdtemp(prefix="planning-", dir=arguments.scratch))
        try:
            os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
            make_folder(scratch / "videos", case, arguments.rows)
            for number, which in enumerate(arguments.plan):
                then_parts = arguments.plan[number + 1 :] == ["resumed"]
                work = (case, which, scratch / "videos", scratch / "out", then_parts)
                process = processes.Process(target=measure, args=work)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)
        finally:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
