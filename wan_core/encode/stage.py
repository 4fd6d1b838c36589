"""encode: a folder of captioned clips to parts of latents and text embeddings.

    <output_dir>/parts/<name>/part.tar           samples (data/samples.py)
                              members.json       member -> [offset, bytes] in part.tar
                              quarantine.jsonl   clips that could not be encoded
                              empty_text.pt      embedding of the empty caption, and
                              negative_text.pt   of the negative prompt
                              record.json
                 clips.jsonl                     the clips of this dataset, and in which part each lies
                 quarantine.jsonl                what is not in the dataset, and why
                 empty_text.pt, negative_text.pt
                 record.json                     EncodeRecord, written last

The folder is named by the settings alone (`settings_fingerprint`) and outlives changes of the clips: parts are
immutable, a clip that lies in one is never encoded again, and the record says which clips make up the dataset.

A quarantined clip is final until its bytes or caption change, unless its row has `retry`: what failed lies around the
clip (its file could not be read, its worker was killed, memory ran out), and every run tries it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_core import records
from wan_core.config import STORED_TEXTS, EncodeConfig, check
from wan_core.data.clips import Clip, Quarantined, kinds, scan
from wan_core.data.folder import Location, open_folder
from wan_core.digests import encoder_identity
from wan_core.encode.buckets import buckets
from wan_core.encode.decode import ClipError
from wan_core.encode.part import (
    Part,
    encode_part,
    load_encoders,
    part_fingerprint,
    part_of,
    quarantine_row,
    read_quarantine,
)
from wan_core.encode.ranges import cut
from wan_core.output import StageOutput
from wan_core.records import EncodeRecord, PartRecord


@dataclass(frozen=True)
class Dataset:
    """The clips of a folder, before any of them is encoded."""

    fingerprint: str  # of settings, encoders and clips; its record's, if no clip is to be tried again
    encoder: dict[str, str]
    clips: tuple[Clip, ...]
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class EncodePlan:
    """What is to be done, and what is there already."""

    dataset: Dataset
    parts: tuple[Part, ...]  # still to be encoded, or to be tried again
    num_encoded: int  # clips that lie in parts already, finally quarantined ones included


def settings_fingerprint(config: EncodeConfig, model: Path) -> str:
    """Names the stage's folder: settings and encoders, but not the clips."""
    return records.fingerprint("encode", config, encoder=encoder_identity(model))


def look(config: EncodeConfig, videos: Location, model: Path) -> Dataset:
    """Find the clips of a folder or URL.

    Raises:
        ValueError: there is no clip, no bucket that one could go to, or the model folder lacks an encoder.
    """
    if config.tokens_per_sample:
        buckets(config)
    encoder = encoder_identity(model)
    scanned = cut(config, open_folder(videos), scan(videos, config.mode))
    keys = sorted(clip.key for clip in scanned.clips)
    wanted = records.fingerprint("encode", config, encoder=encoder, clips=keys)
    return Dataset(wanted, encoder, scanned.clips, scanned.quarantined)


def plan(config: EncodeConfig, dataset: Dataset, output_dir: Path) -> EncodePlan:
    """Look at the parts that exist, and group the clips that are missing, or to be tried again, into new parts."""
    known = {key for part in _whole_parts(config, dataset.encoder, output_dir) for key in part.final_keys}
    missing = [clip for clip in dataset.clips if clip.key not in known]
    size = config.clips_per_part
    groups = [tuple(missing[i : i + size]) for i in range(0, len(missing), size)]
    parts = tuple(part_of(group) for group in groups)
    return EncodePlan(dataset, parts, num_encoded=len(dataset.clips) - len(missing))


def finish(config: EncodeConfig, plan: EncodePlan, output_dir: Path) -> EncodeRecord:
    """Gather the parts, once all of `plan.parts` are encoded, into the dataset's record.

    A record of which clips are to be tried again has a fingerprint that also covers these: so the next run, which looks
    for the dataset's, does not take it for done, and later stages work again only once the set of clips is another.

    Raises:
        ValueError: more than `max_quarantine_share` of the clips is quarantined, or none is left.
    """
    started = time.monotonic()
    dataset = plan.dataset
    for left in (output_dir / "parts").glob(".*"):  # by workers that were killed; this run alone writes here
        shutil.rmtree(left, ignore_errors=True)
    parts = _whole_parts(config, dataset.encoder, output_dir)
    encoded = {key: part.record.path.name for part in parts for key in part.encoded}
    faults = _faults(parts)
    bad = [{"path": row.path, "reason": row.reason} for row in dataset.quarantined]
    again: list[str] = []  # keys
    for clip in dataset.clips:
        if clip.key in encoded:
            continue
        if clip.key not in faults:
            raise ValueError(f"clip {clip.path} lies in no part of {output_dir}; run encode_part for each planned part")
        bad.append(quarantine_row(clip.path, faults[clip.key]))
        again += [clip.key] if faults[clip.key].retry else []
    (output_dir / records.RECORD_NAME).unlink(missing_ok=True)  # from here on the old dataset is not whole
    _write_lines(output_dir / "quarantine.jsonl", bad)
    kept = [clip for clip in dataset.clips if clip.key in encoded]
    _check_quarantine(config, len(kept), bad, output_dir)
    rows = (
        {"key": clip.key, "path": clip.path, "digest": clip.digest, "caption": clip.caption, "part": encoded[clip.key]}
        for clip in kept
    )
    _write_lines(output_dir / "clips.jsonl", rows)
    used = sorted({encoded[clip.key] for clip in kept})
    for name in STORED_TEXTS:
        shutil.copyfile(output_dir / "parts" / used[0] / name, output_dir / name)
    made = records.digest([dataset.fingerprint, *sorted(again)]) if again else dataset.fingerprint
    output = StageOutput("encode", output_dir, output_dir, config, made)
    record = output.finish(
        EncodeRecord, parts=tuple(output_dir / "parts" / name for name in used), num_clips=len(kept),
        num_quarantined=len(bad), encoder=dataset.encoder,
        vae_error=max((part.record.vae_error or 0.0 for part in parts), default=0.0),
    )  # fmt: skip
    seconds = time.monotonic() - started + sum(part.record.seconds for part in parts)
    unused = tuple(f"parts/{part.record.path.name}/" for part in parts if part.record.path.name not in used)
    files = {name: size for name, size in record.files.items() if not (unused and name.startswith(unused))}
    record = replace(record, files=files, seconds=round(seconds, 3))
    records.save_record(record, output_dir)
    return record


def run(
    config: EncodeConfig, videos: Location, model: Path, output_dir: Path, device: torch.device | str = "cpu"
) -> EncodeRecord:
    """The whole stage in this process; clips that existing parts hold are not encoded again."""
    from tqdm import tqdm

    dataset = look(config, videos, model)
    if found := records.find_record(EncodeRecord, output_dir, dataset.fingerprint):
        return found
    with _alone(output_dir):
        planned = plan(config, dataset, output_dir)
        with tqdm(total=len(dataset.clips), initial=planned.num_encoded, desc="encode", unit="clip") as bar:
            encoders = load_encoders(config, model, device) if planned.parts else None
            for part in planned.parts:
                assert encoders is not None
                encode_part(config, part, videos, output_dir, encoders, progress=lambda done: bar.update())
        return finish(config, planned, output_dir)


@contextlib.contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Keep other runs away from a folder."""
    check(not output_dir.is_file(), f"output_dir={output_dir} is a file; give a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            sentence = f"output_dir={output_dir}: another run is writing to it; wait for it to end, or give another"
            raise ValueError(sentence) from error
        yield


@dataclass(frozen=True)
class _WholePart:
    record: PartRecord
    encoded: frozenset[str]  # keys
    quarantined: dict[str, ClipError]  # key -> reason

    @property
    def final_keys(self) -> list[str]:
        return [*self.encoded, *(key for key, fault in self.quarantined.items() if not fault.retry)]


def _faults(parts: list[_WholePart]) -> dict[str, ClipError]:
    """Why each key is in no part: the newest reason, and a final one before those that may pass."""
    some = [part for part in parts if part.quarantined]
    some.sort(key=lambda part: (part.record.path / records.RECORD_NAME).stat().st_mtime_ns)
    found = [(key, fault) for part in some for key, fault in part.quarantined.items()]
    return dict(sorted(found, key=lambda item: not item[1].retry))


def _whole_parts(config: EncodeConfig, encoder: dict[str, str], output_dir: Path) -> list[_WholePart]:
    """The parts below a folder that were made with these settings and are unaltered."""
    parts = []
    for folder in sorted((output_dir / "parts").glob("[!.]*")):
        record = records.find_record(PartRecord, folder, None)
        if record is None:
            continue
        members = json.loads((folder / "members.json").read_text())
        encoded = frozenset(name.partition(".")[0] for name in members)
        rows = read_quarantine(folder)
        quarantined = {row["key"]: ClipError(row["reason"], row.get("retry", False)) for row in rows}
        if record.fingerprint == part_fingerprint(config, encoder, [*encoded, *quarantined]):
            parts.append(_WholePart(record, encoded, quarantined))
    return parts


def _check_quarantine(config: EncodeConfig, num_clips: int, bad: list[dict[str, Any]], output_dir: Path) -> None:
    share = len(bad) / (num_clips + len(bad))
    if num_clips and share <= config.max_quarantine_share:
        return
    top = "; ".join(f"{count} x {reason}" for reason, count in kinds(row["reason"] for row in bad)[:3])
    again = sum("retry" in row for row in bad)
    raise ValueError(
        f"{len(bad)} of {num_clips + len(bad)} clips are quarantined ({top}), more than "
        f"max_quarantine_share={config.max_quarantine_share}; {output_dir / 'quarantine.jsonl'} lists them: "
        "repair them, or raise max_quarantine_share"
        + (f"; {again} of them could not be read or ended their worker: run again, which tries these" if again else "")
    )


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a .jsonl file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
